"""The protocol's tests once more, with servers of the front end that the other tests don't use."""

import sys

import hosting
import pytest
from module_runs import MODULES, Results, run_modules


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Results:
    report = tmp_path_factory.mktemp("other") / "report.xml"
    command = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider")
    return run_modules(command, report, {"LAYERCAST_TEST_FRONT_END": hosting.OTHER})


@pytest.mark.timeout(960)
@pytest.mark.parametrize("module", MODULES)
def test_the_module_passes_with_the_other_front_end(results, module):
    results.assert_passed(module)


def test_nothing_fails_there_beside_the_tests(results):
    results.assert_nothing_else_failed()
