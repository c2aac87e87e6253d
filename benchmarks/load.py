"""Closed-loop load by h2load, and the servers that it is sent to, each in a process group of its own."""

import contextlib
import os
import re
import resource
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import grpc
import numpy as np
from workloads import Workload, framed, request

from layercast.proto.messages import ModelMetadataRequest, ServerReadyRequest
from layercast.proto.rpc import INFERENCE

_INFER = INFERENCE["ModelInfer"]
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Server:
    """A command that serves gRPC on `port`."""

    name: str
    command: Sequence[str]
    port: int
    environment: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Load:
    """What one server did under one load: requests/s, milliseconds, the group's memory, seconds until it was ready.

    `cpu_s` is the group's processor time over all of the load, its warm-up included; `load_cpus` the processors
    that the load itself took, 0 to 1.
    """

    rate: float
    p50_ms: float
    p99_ms: float
    mean_ms: float
    memory_mb: int
    ready_s: float
    cpu_s: float
    load_cpus: float

    def json(self) -> dict[str, float]:
        """Return the figures by name."""
        return asdict(self)

    def times(self, rows: float) -> "Load":
        """Return the same with the rate in rows, `rows` of them a request."""
        return replace(self, rate=self.rate * rows)


Process = subprocess.Popen[bytes]


@contextlib.contextmanager
def started(server: Server, seconds: float = 180) -> Iterator[tuple[grpc.Channel, Process, float]]:
    """Start `server`, wait until it is ready, and stop it with everything that it started."""
    log = Path(tempfile.gettempdir()) / f"bench-{server.name}.log"
    began = time.perf_counter()
    with log.open("wb") as file:
        process = subprocess.Popen(
            server.command, stdout=file, stderr=file, start_new_session=True, env=os.environ | dict(server.environment)
        )
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1)]
    channel = grpc.insecure_channel(f"127.0.0.1:{server.port}", options)
    try:
        _wait(channel, process, seconds, log)
        yield channel, process, time.perf_counter() - began
    finally:
        channel.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait(channel: grpc.Channel, process: Process, seconds: float, log: Path) -> None:
    method = INFERENCE["ServerReady"]
    ready = channel.unary_unary(method.path, method.request.SerializeToString, method.response.FromString)
    until = time.monotonic() + seconds
    while time.monotonic() < until and process.poll() is None:
        with contextlib.suppress(grpc.RpcError):
            if ready(ServerReadyRequest(), timeout=2).ready:
                return
        time.sleep(0.1)
    raise SystemExit(f"{process.args!r} did not become ready (exit {process.poll()}):\n{log.read_text()[-2000:]}")


def run(server: Server, workload: Workload, seconds: float, oracle: list[np.ndarray]) -> Load:
    """Start, ask once (the answer must be the first server's), load, stop."""
    with started(server) as (channel, process, ready_s):
        return loaded(server, channel, process, ready_s, workload, seconds, oracle)


def loaded(
    server: Server, channel: grpc.Channel, process: Process, ready_s: float, workload: Workload, seconds: float,
    oracle: list[np.ndarray],
) -> Load:  # fmt: skip
    """Load a server that was started. Its answers before and after must be the first in `oracle`, if there is one."""
    method = INFERENCE["ModelMetadata"]
    ask = channel.unary_unary(method.path, method.request.SerializeToString, method.response.FromString)
    spec = ask(ModelMetadataRequest(name=workload.model), timeout=5).inputs[0]
    message = request(workload, spec.name, spec.datatype)
    infer = channel.unary_unary(_INFER.path, _INFER.request.SerializeToString, _INFER.response.FromString)
    before = infer(message, timeout=60)
    _check(server, before.raw_output_contents[0], oracle)
    busy = cpu_seconds(process.pid)
    load = h2load(server.port, message.SerializeToString(), workload.concurrency, seconds, before.ByteSize())
    busy = cpu_seconds(process.pid) - busy
    _check(server, infer(message, timeout=60).raw_output_contents[0], oracle)
    if process.poll() is not None:
        raise SystemExit(f"{server.name} died under load (exit {process.poll()})")
    return Load(**load, memory_mb=_memory_mb(process.pid), ready_s=ready_s, cpu_s=busy)


def _check(server: Server, raw: bytes, oracle: list[np.ndarray]) -> None:
    values = np.frombuffer(raw, "f4")
    if oracle and not np.allclose(values, oracle[0], rtol=_TOLERANCE, atol=_TOLERANCE):
        raise SystemExit(f"{server.name}: its answer differs from the first server's")
    oracle.append(values)


def h2load(port: int, message: bytes, concurrency: int, seconds: float, answer_bytes: int) -> dict[str, float]:
    """Send `message` over `concurrency` connections, one call at a time on each; every answer must be whole."""
    with tempfile.TemporaryDirectory() as folder:
        body, log = Path(folder) / "body", Path(folder) / "log"
        body.write_bytes(framed(message))
        command = [
            "h2load", "-c", str(concurrency), "-m", "1", "-t", "1", "-d", str(body),
            "-H", "content-type: application/grpc", "-H", "te: trailers", f"http://127.0.0.1:{port}{_INFER.path}",
        ]  # fmt: skip
        subprocess.run([*command, "-D", "1"], capture_output=True, check=True)  # its own warm-up blurs the byte count
        spent, began = _children_cpu(), time.perf_counter()
        out = subprocess.run(
            [*command, "-D", f"{seconds:g}", f"--log-file={log}"], capture_output=True, text=True, check=True
        ).stdout
        load_cpus = (_children_cpu() - spent) / (time.perf_counter() - began)
        if not log.read_bytes():
            raise SystemExit(f"not one answer in {seconds:g} s; load it for longer")
        times = np.loadtxt(log, dtype="i8", ndmin=2)
    if not (found := re.search(r"(\d+) failed, (\d+) errored, (\d+) timeout", out)):
        raise SystemExit(f"h2load said:\n{out}")
    received = re.search(r"\((\d+)\) data", out)
    whole = int(received[1]) / max(1, len(times)) / (5 + answer_bytes) if received else 0
    # The window cuts a few calls, and the numbers in an answer have no fixed width.
    if any(int(value) for value in found.groups()) or not 0.97 < whole < 1.03:
        raise SystemExit(f"errors under load: {found[0]}; {whole:.3f} of the expected bytes an answer")
    latency = times[:, 2] / 1e3
    return {
        "rate": len(times) / seconds,
        "p50_ms": float(np.percentile(latency, 50)),
        "p99_ms": float(np.percentile(latency, 99)),
        "mean_ms": float(latency.mean()),
        "load_cpus": load_cpus,
    }


def _children_cpu() -> float:
    """Return the processor time of the processes that were waited for: loads, not servers, which run on."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _group(pid: int) -> Iterator[Path]:
    """Yield the folders under /proc of the processes in the group of `pid`."""
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            if os.getpgid(int(folder.name)) == pid:
                yield folder


def _memory_mb(pid: int) -> int:
    total = 0
    for folder in _group(pid):
        with contextlib.suppress(OSError, TypeError):
            found = re.search(r"^Pss:\s+(\d+)", (folder / "smaps_rollup").read_text(), re.MULTILINE)
            total += int(found[1]) if found else 0
    return total // 1024


def cpu_seconds(pid: int) -> float:
    """Return the processor time that the processes in the group of `pid` have used."""
    ticks = 0
    for folder in _group(pid):
        with contextlib.suppress(OSError):
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")
