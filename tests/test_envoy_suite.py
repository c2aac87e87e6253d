"""The protocol's tests once more, with servers that answer through Envoy: pytest runs inside it, in one process."""

import sys

import pytest
from module_runs import MODULES, TESTS, Results, run_modules

pytest.importorskip("pyvoy", reason="the front end envoy needs layercast[envoy]")


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Results:
    report = tmp_path_factory.mktemp("envoy") / "report.xml"
    return run_modules((sys.executable, str(TESTS / "in_envoy.py")), report, {})


@pytest.mark.timeout(960)
@pytest.mark.parametrize("module", MODULES)
def test_the_module_passes_inside_envoy(results, module):
    results.assert_passed(module)


def test_nothing_fails_there_beside_the_tests(results):
    results.assert_nothing_else_failed()
