"""What a stream gains over single calls, for single rows of mnist: two Python clients, and the server alone.

    python benchmarks/streaming.py [--rounds 3] [--rows 2000] [--front-end direct] [--json FILE]

Server and client are processes of one machine. The ways of asking take turns, so that what else runs there hits all of
them; a ratio is the median of the rounds' own. Every answer of the clients is held against one batch's. With h2load,
requests are bytes already, so what is measured is the server: rows a second, and its processor time for one.
"""

import argparse
import asyncio
import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import numpy as np
from load import Server, cpu_seconds, started
from workloads import Workload, framed, request

from layercast.client import AsyncClient, Client
from layercast.models import zoo
from layercast.proto.messages import ModelInferRequest
from layercast.proto.rpc import INFERENCE
from layercast.server.settings import default_cache

MODEL, IMAGES, TASKS = "mnist", 400, 32
# Requests in one stream of h2load, which sends a stream's messages as one body.
MESSAGES = 500

MANY, SINGLE = "Client: predict_many", "Client: predict, one after the other"
ASYNC_MANY, ASYNC_SINGLE = "AsyncClient: predict_many", "AsyncClient: predict, one after the other"
ASYNC_TASKS = f"AsyncClient: predict, {TASKS} tasks"
PAIRS = (
    (MANY, SINGLE),
    (ASYNC_MANY, ASYNC_SINGLE),
    (ASYNC_MANY, ASYNC_TASKS),
    ("server: 1 stream", "server: 16 single calls in flight"),
    ("server: 4 streams", "server: 64 single calls in flight"),
)


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=2000, help="of one measurement")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="where the exported zoo is kept")
    parser.add_argument("--front-end", default="direct", choices=("direct", "grpcio"))
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(zoo.ensure_exported(args.cache, report=print) / MODEL, Path(folder) / MODEL)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        options = ["--grpc-port", str(port), "--http-port", "0", "--metrics-port", "0", "--front-end", args.front_end]
        command = [sys.executable, "-m", "layercast.server", "serve", "--repository", folder, *options]
        with started(Server("layercast", command, port)) as (_, process, _):
            rounds = [_round(port, process.pid, args.rows) for _ in range(args.rounds)]
    print(_table(rounds))
    if args.json:
        args.json.write_text(json.dumps({"load": os.getloadavg(), "rounds": rounds}, indent=1) + "\n")
    return 0


Figures = dict[str, tuple[float, float]]
"""Rows a second, and microseconds of processor time for one: the client's own, or with h2load the server's."""


def _round(port: int, pid: int, rows: int) -> Figures:
    figures = _clients(f"127.0.0.1:{port}", rows)
    if shutil.which("h2load"):
        figures |= {f"server: {n} single calls in flight": _raw(port, pid, "ModelInfer", rows, n) for n in (16, 64)}
        figures |= {f"server: {n} stream{'s' * (n > 1)}": _raw(port, pid, "ModelStreamInfer", rows, n) for n in (1, 4)}
    return figures


def _clients(url: str, rows: int) -> Figures:
    images = np.random.default_rng(0).random((IMAGES, 1, 28, 28), dtype="f4")

    def items(count: int) -> Iterator[np.ndarray]:
        return (images[number % IMAGES][None] for number in range(count))

    with Client(url) as client:
        want = client.predict(MODEL, images)

        def timed(ask: Callable[[], list[np.ndarray]], count: int) -> tuple[float, float]:
            began, busy = time.perf_counter(), time.process_time()
            answers = ask()
            took, busy = time.perf_counter() - began, time.process_time() - busy
            np.testing.assert_allclose(np.concatenate(answers), want[np.arange(count) % IMAGES], atol=1e-4)
            return count / took, 1e6 * busy / count

        few = rows // 5
        return {
            SINGLE: timed(lambda: [client.predict(MODEL, item) for item in items(few)], few),
            MANY: timed(lambda: list(client.predict_many(MODEL, items(rows))), rows),
            ASYNC_SINGLE: timed(lambda: asyncio.run(_tasks(url, items(few), few, 1)), few),
            ASYNC_TASKS: timed(lambda: asyncio.run(_tasks(url, items(rows), rows, TASKS)), rows),
            ASYNC_MANY: timed(lambda: asyncio.run(_stream(url, items(rows))), rows),
        }


async def _tasks(url: str, items: Iterator[np.ndarray], rows: int, tasks: int) -> list[np.ndarray]:
    """Keep as many single calls in flight as there are tasks."""
    answers: list[np.ndarray] = [np.empty(0)] * rows
    numbered = enumerate(items)
    async with AsyncClient(url) as client:

        async def ask() -> None:
            for number, item in numbered:
                answers[number] = await client.predict(MODEL, item)

        await asyncio.gather(*(ask() for _ in range(tasks)))
    return answers


async def _stream(url: str, items: Iterator[np.ndarray]) -> list[np.ndarray]:
    async with AsyncClient(url) as client:
        results: AsyncIterator[np.ndarray] = client.predict_many(MODEL, items)
        return [result async for result in results]


def _raw(port: int, pid: int, rpc: str, rows: int, in_flight: int) -> tuple[float, float]:
    """Let h2load keep so many calls in flight over one connection; each is one request, or a stream of many."""
    message: ModelInferRequest = request(Workload(MODEL, (1, 1, 28, 28), in_flight), "image", "FP32")
    each = 1 if rpc == "ModelInfer" else MESSAGES
    calls = max(rows // each, in_flight)
    with tempfile.NamedTemporaryFile() as body:
        body.write(framed(message.SerializeToString()) * each)
        body.flush()
        command = [
            "h2load", "-c", "1", "-t", "1", "-m", str(in_flight), "-n", str(calls), "-d", body.name,
            "-H", "content-type: application/grpc", "-H", "te: trailers",
            f"http://127.0.0.1:{port}{INFERENCE[rpc].path}",
        ]  # fmt: skip
        began, busy = time.perf_counter(), cpu_seconds(pid)
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        took, busy = time.perf_counter() - began, cpu_seconds(pid) - busy
    received = re.search(r"\((\d+)\) data", out)
    # An answer of ten logits takes about 150 bytes; an error inside a stream would take fewer or more.
    size = int(received[1]) / (calls * each) if received else 0
    if f"{calls} succeeded" not in out or not 100 < size < 250:
        raise SystemExit(f"errors under load, {size:.0f} bytes an answer:\n{out}")
    return calls * each / took, 1e6 * busy / (calls * each)


def _table(rounds: list[Figures]) -> str:
    lines = [f"{'':<40} {'rows/s':>8} {'µs/row':>8} {'gain, rows/s':>20} {'gain, µs':>10}"]
    for stream, single in PAIRS:
        if stream not in rounds[0]:
            continue
        for name in (single, stream):
            rate, cost = (statistics.median(figures[name][at] for figures in rounds) for at in (0, 1))
            lines.append(f"{name:<40} {rate:>8.0f} {cost:>8.0f}")
        gains = sorted(figures[stream][0] / figures[single][0] for figures in rounds)
        spread = f"{statistics.median(gains):.2f} ({gains[0]:.2f}-{gains[-1]:.2f})"
        cheaper = statistics.median(figures[single][1] / figures[stream][1] for figures in rounds)
        lines[-1] += f" {spread:>20} {cheaper:>10.2f}"
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
