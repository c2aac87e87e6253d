"""The protocol's tests run once more by a pytest of their own, and what became of them."""

import os
import subprocess
import xml.etree.ElementTree as ET
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

MODULES = (
    "test_bad_requests", "test_batcher_endings", "test_feature_stream", "test_health", "test_network_faults",
    "test_rest_bodies", "test_rest_errors", "test_rest_infer", "test_rest_routes", "test_security_tls",
    "test_security_tokens", "test_server_inference", "test_stream", "test_tritonclient", "test_tritonclient_http",
    "test_wire",
)  # fmt: skip
TESTS = Path(__file__).parent


class Results:
    """What became of the tests, by module: the output of those that failed, "" for the others."""

    def __init__(self, report: Path, done: "subprocess.CompletedProcess[str]") -> None:
        self.code, self.output = done.returncode, done.stdout
        self.cases: dict[str, dict[str, str]] = defaultdict(dict)
        for case in ET.parse(report).iter("testcase"):
            faults = [fault for fault in case if fault.tag in ("failure", "error")]
            module = case.attrib["classname"].rpartition(".")[2]
            self.cases[module][case.attrib["name"]] = "\n".join(fault.text or "" for fault in faults)

    def assert_passed(self, module: str) -> None:
        """Fail with all that failed in `module`, or because none of it ran."""
        assert self.cases[module], self.output[-4000:]
        failed = {name: text for name, text in self.cases[module].items() if text}
        assert not failed, "\n\n".join(f"{name}\n{text}" for name, text in failed.items())

    def assert_nothing_else_failed(self) -> None:
        """Fail when the run did for another reason than its tests."""
        assert self.code == 0, self.output[-4000:]


def run_modules(
    command: Sequence[str],
    report: Path,
    environment: Mapping[str, str],
    modules: Sequence[str] = MODULES,
) -> Results:
    """Run the modules with `command`, which takes pytest's arguments, as part of this run of the tests."""
    done = subprocess.run(
        [*command, "-q", f"--junitxml={report}", *(f"{module}.py" for module in modules)],
        cwd=TESTS, env={**os.environ, **environment},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900,
    )  # fmt: skip
    assert report.is_file(), done.stdout[-4000:]
    return Results(report, done)
