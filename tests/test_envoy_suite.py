"""The protocol's tests once more, with servers that answer through Envoy: pytest runs inside it, in one process."""

import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections import defaultdict
from pathlib import Path

import pytest

pytest.importorskip("pyvoy", reason="the front end envoy needs layercast[envoy]")

MODULES = (
    "test_bad_requests", "test_batcher_endings", "test_feature_stream", "test_health", "test_network_faults",
    "test_rest_bodies", "test_rest_errors", "test_rest_infer", "test_rest_routes", "test_security_tls",
    "test_security_tokens", "test_server_inference", "test_stream", "test_tritonclient", "test_tritonclient_http",
    "test_wire",
)  # fmt: skip
TESTS = Path(__file__).parent


class Results:
    """What became of the tests inside Envoy, by module: the output of those that failed, "" for the others."""

    def __init__(self, report: Path, done: "subprocess.CompletedProcess[str]") -> None:
        self.code, self.output = done.returncode, done.stdout
        self.cases: dict[str, dict[str, str]] = defaultdict(dict)
        for case in ET.parse(report).iter("testcase"):
            faults = [fault for fault in case if fault.tag in ("failure", "error")]
            module = case.attrib["classname"].rpartition(".")[2]
            self.cases[module][case.attrib["name"]] = "\n".join(fault.text or "" for fault in faults)


@pytest.fixture(scope="module")
def results(repository, tmp_path_factory) -> Results:
    report = tmp_path_factory.mktemp("envoy") / "report.xml"
    command = [sys.executable, str(TESTS / "in_envoy.py"), "-q", f"--junitxml={report}"]
    environment = {**os.environ, "LAYERCAST_TEST_REPOSITORY": str(repository)}
    done = subprocess.run(
        [*command, *(f"{module}.py" for module in MODULES)],
        cwd=TESTS, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900,
    )  # fmt: skip
    assert report.is_file(), done.stdout[-4000:]
    return Results(report, done)


@pytest.mark.timeout(960)
@pytest.mark.parametrize("module", MODULES)
def test_the_module_passes_inside_envoy(results, module):
    assert results.cases[module]
    failed = {name: text for name, text in results.cases[module].items() if text}
    assert not failed, "\n\n".join(f"{name}\n{text}" for name, text in failed.items())


def test_nothing_fails_there_beside_the_tests(results):
    assert results.code == 0, results.output[-4000:]
