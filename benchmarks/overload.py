"""What a server does at ten times its capacity (`make overload`): goodput, latency of what it accepts, probes.

A model that sleeps 50 ms a batch stands for one that computes: its capacity is known, and the processors are left to
the server and to the load. First the peak is measured with as many callers as keep every batch full; then requests
come at ten times that rate, whatever becomes of them. Prints a table and exits with 1 when goodput falls below 80 % of
the peak, when the 99th percentile of accepted requests exceeds the queue timeout and two batches, or when a probe is
slow.
"""

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from pathlib import Path

import grpc
import numpy as np

from layercast.models.export.writer import export_artefact
from layercast.models.foreign.factory import Code, build
from layercast.models.foreign.trust import ARTEFACT_CODE, Trust
from layercast.proto.messages import ModelInferRequest, ServerLiveRequest
from layercast.proto.rpc import INFERENCE

BATCH, BATCH_SECONDS, QUEUE_TIMEOUT = 8, 0.05, 0.2
SLEEPER = f"""
import time
import torch
from torch import nn


class Sleeper(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        if not torch.compiler.is_exporting():
            time.sleep({BATCH_SECONDS})
        return x * self.scale
"""


def main() -> int:
    """Measure, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20, help="of overload")
    parser.add_argument("--times", type=float, default=10, help="how many times its capacity")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        repository = Path(folder) / "models"
        _export(repository, Path(folder) / "sleeper.py")
        with subprocess.Popen(_command(repository), stdout=subprocess.PIPE, text=True) as server:
            try:
                ports = _ports(server)
                figures = asyncio.run(_measure(ports, args.seconds, args.times))
            finally:
                server.terminate()
    for name, value in figures.items():
        print(f"{name:<42} {value:>10.3f}" if isinstance(value, float) else f"{name:<42} {value!s:>10}")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0 if figures["holds"] else 1


def _export(repository: Path, path: Path) -> None:
    path.write_text(SLEEPER)
    code = Code("sleeper.py", path.read_bytes(), path)
    spec = {"name": "x", "datatype": "FP32", "shape": [-1, 4]}
    card = {
        "name": "sleeper", "architecture": "sleeper.py:Sleeper",
        "inputs": [spec], "outputs": [{**spec, "name": "output"}],
    }  # fmt: skip
    module = build("sleeper.py:Sleeper", {}, Trust.of([ARTEFACT_CODE]), code).eval()
    export_artefact(module, card, repository / "sleeper" / "1", programs=[], code=code)


def _command(repository: Path) -> list[str]:
    knobs = {"max-batch": BATCH, "queue-rows": 1024, "queue-timeout-ms": QUEUE_TIMEOUT * 1000, "engine": "eager"}
    ports = {"grpc-port": 0, "http-port": 0, "metrics-port": 0}
    options = [f"--{name}={value:g}" if isinstance(value, float) else f"--{name}={value}" for name, value in
               {**knobs, **ports}.items()]  # fmt: skip
    command = [sys.executable, "-m", "layercast.server", "serve", "--repository", str(repository)]
    return [*command, "--trust", ARTEFACT_CODE, *options]


def _ports(server: "subprocess.Popen[str]") -> tuple[str, str]:
    for line in server.stdout or ():
        if "ready in" in line:
            grpc_port = line.partition("gRPC ")[2].split()[0]
            return grpc_port, line.partition("metrics ")[2].strip()
    raise SystemExit("the server did not start")


class _Caller:
    """Sends the same request and notes how each ended, and how long accepted ones took."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        method = INFERENCE["ModelInfer"]
        self._infer = channel.unary_unary(method.path, method.request.SerializeToString, method.response.FromString)
        self._message = ModelInferRequest(model_name="sleeper", raw_input_contents=[np.ones(4, "f4").tobytes()])
        self._message.inputs.add(name="x", datatype="FP32", shape=[1, 4])
        self.ends: Counter[str] = Counter()
        self.accepted: list[float] = []

    async def ask(self) -> None:
        start = time.perf_counter()
        try:
            await self._infer(self._message, timeout=10)
        except grpc.aio.AioRpcError as error:
            self.ends[error.code().name] += 1
        else:
            self.ends["OK"] += 1
            self.accepted.append(time.perf_counter() - start)


async def _measure(ports: tuple[str, str], seconds: float, times: float) -> dict[str, float | str | bool]:
    async with grpc.aio.insecure_channel(ports[0]) as channel, grpc.aio.insecure_channel(ports[0]) as other:
        peak = await _peak(channel)
        caller, probes = _Caller(channel), []
        scrapes: list[float] = []
        probing = [asyncio.create_task(_probe(other, probes)), asyncio.create_task(_scrape(ports[1], scrapes))]
        calls = set()
        began, sent = time.perf_counter(), 0
        while (now := time.perf_counter() - began) < seconds:
            while sent < now * peak * times:
                calls.add(asyncio.create_task(caller.ask()))
                sent += 1
            calls = {call for call in calls if not call.done()}
            await asyncio.sleep(0.005)
        goodput = caller.ends["OK"] / seconds
        for task in probing:
            task.cancel()
        await asyncio.gather(*calls)
    p99 = _percentile(caller.accepted)
    allowed = QUEUE_TIMEOUT + 2 * BATCH_SECONDS
    live, scrape = _percentile(probes), _percentile(scrapes)
    return {
        "peak, requests/s": peak, "sent, requests/s": sent / seconds, "goodput, requests/s": goodput,
        "goodput / peak (at least 0.8)": goodput / peak,
        "p99 of accepted, s": p99, "allowed: queue timeout and two batches, s": allowed,
        "ServerLive p99, s (at most 0.2)": live, "/metrics p99, s (at most 0.5)": scrape,
        "ends": str(dict(caller.ends)),
        "holds": goodput >= 0.8 * peak and p99 <= allowed and live <= 0.2 and scrape <= 0.5,
    }  # fmt: skip


async def _peak(channel: grpc.aio.Channel, seconds: float = 5.0) -> float:
    caller, until = _Caller(channel), time.perf_counter() + seconds

    async def loop() -> None:
        while time.perf_counter() < until:
            await caller.ask()

    await asyncio.gather(*(loop() for _ in range(4 * BATCH)))
    return caller.ends["OK"] / seconds


async def _probe(channel: grpc.aio.Channel, took: list[float]) -> None:
    method = INFERENCE["ServerLive"]
    live = channel.unary_unary(method.path, method.request.SerializeToString, method.response.FromString)
    while True:
        start = time.perf_counter()
        await live(ServerLiveRequest(), timeout=5)
        took.append(time.perf_counter() - start)
        await asyncio.sleep(0.05)


async def _scrape(url: str, took: list[float]) -> None:
    def read() -> None:
        with urllib.request.urlopen(url, timeout=5) as page:
            page.read()

    while True:
        start = time.perf_counter()
        await asyncio.to_thread(read)
        took.append(time.perf_counter() - start)
        await asyncio.sleep(0.2)


def _percentile(values: list[float]) -> float:
    return statistics.quantiles(values, n=100)[98] if len(values) > 1 else float("nan")


if __name__ == "__main__":
    sys.exit(main())
