"""The Makefile and .ci/run: what they call, and that Ctrl-C and options reach the server."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TARGETS = {
    "bench",
    "help",
    "setup",
    "serve",
    "compile",
    "test",
    "soak",
    "fuzz",
    "overload",
    "check",
    "format",
    "proto",
    "clean",
}
# Says that it started, and like the real server leaves with 0 after an interrupt.
FAKE_SERVER = f"""#!{sys.executable}
import signal, sys
signal.signal(signal.SIGINT, lambda *_: (print("drained", flush=True), sys.exit(0)))
signal.signal(signal.SIGTERM, lambda *_: (print("drained", flush=True), sys.exit(0)))
if "--fail" in sys.argv:
    sys.exit(3)
print("started", *sys.argv[1:], flush=True)
signal.pause()
"""


@pytest.fixture(autouse=True)
def no_outer_make(monkeypatch: pytest.MonkeyPatch) -> None:
    """`make test` hands its own level and flags down, which would change what an inner make prints."""
    for name in [name for name in os.environ if name.startswith(("MAKE", "MFLAGS"))]:
        monkeypatch.delenv(name)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name, text in (("scripts/setup.sh", "#!/bin/sh\necho setup $1\n"), (".venv/bin/layercast", FAKE_SERVER)):
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        path.write_text(text)
        path.chmod(0o755)
    return tmp_path


def make(*arguments: str, cwd: Path = ROOT) -> str:
    return subprocess.run(["make", *arguments], cwd=cwd, capture_output=True, text=True, check=True).stdout


def test_make_alone_lists_every_target() -> None:
    assert set(re.findall(r"^  make (\w+) +\S", make(), re.MULTILINE)) == TARGETS


def test_test_and_check_run_the_tools() -> None:
    assert "-m pytest" in make("-n", "test")
    check = make("-n", "check")
    for tool in ("ruff check", "ruff format --check", "mypy", "hadolint Dockerfile"):
        assert tool in check
    for package in ("proto", "server", "models", "client"):
        assert f"-p layercast.{package}" in check


def test_check_links_the_packages_for_the_type_checker(checkout: Path) -> None:
    (checkout / "server").mkdir()
    make("build/typed/layercast/server", cwd=checkout)
    assert (checkout / "build/typed/layercast/server").resolve() == checkout / "server"


@pytest.mark.parametrize(("number", "whole_group"), [(signal.SIGINT, True), (signal.SIGTERM, False)])
def test_a_signal_reaches_the_server_and_make_adds_no_error(
    checkout: Path, number: signal.Signals, whole_group: bool
) -> None:
    """A terminal sends Ctrl-C to make and the server alike; a supervisor stops only the process it started."""
    process = subprocess.Popen(
        ["make", "serve", "ARGS=--grpc-port 9001"], cwd=checkout, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, start_new_session=True,
    )  # fmt: skip
    with process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(2)]
        assert lines == ["setup serve\n", "started serve --grpc-port 9001\n"]
        (os.killpg if whole_group else os.kill)(process.pid, number)
        rest, _ = process.communicate(timeout=10)
    assert rest.startswith("drained\n")
    assert "Error" not in rest


def test_a_failing_server_fails_make(checkout: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError) as failure:
        make("serve", "ARGS=--fail", cwd=checkout)
    assert failure.value.returncode != 0


def test_ci_runs_the_two_commands_and_stops_at_a_failure(tmp_path: Path) -> None:
    (tmp_path / ".ci").mkdir()
    script = shutil.copy(ROOT / ".ci/run", tmp_path / ".ci/run")
    (tmp_path / "Makefile").write_text(
        "test:\n\t@echo tested $(CI); cat\n\t@exit $(or $(CODE),0)\ncheck:\n\t@echo checked\n"
    )

    def run(**environ: str) -> subprocess.CompletedProcess[str]:
        environ = {**os.environ, "CI": "true", **environ}
        return subprocess.run(
            ["bash", script],
            cwd="/",
            env=environ,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )

    passed, failed = run(), run(CODE="1")
    assert (passed.returncode, passed.stdout) == (0, "tested true\nchecked\n")
    assert failed.returncode != 0
    assert "checked" not in failed.stdout
