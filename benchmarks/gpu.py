"""What a GPU gives, and what the server adds to it: one table, in a minute or two, on one card.

    python benchmarks/gpu.py [--model resnet] [--device cuda:0] [--max-batch 128] [--precision fp32,bf16]

For each precision, with the model's own forward on the card:

* in process, rows/s by rows of a batch: layer by layer, and replaying a CUDA graph, with the copies there and back
* the same of the engine that the server chooses, through the batcher of a server in this process, with as many single
  rows waiting as a batch holds; and what that adds, in microseconds of a processor and of the clock, to a batch

No network: `side_by_side.py` measures that, on this card too, since its servers take a GPU if there is one.
"""

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from workloads import rows, write_repository

from layercast.models.foreign.trust import ARTEFACT_CODE, Trust
from layercast.models.manifest import Manifest
from layercast.server import environment
from layercast.server.engines import cuda
from layercast.server.engines.eager import EagerEngine
from layercast.server.loader import load
from layercast.server.metrics import Metrics
from layercast.server.model import ServedModel
from layercast.server.monitor import ModelMonitor
from layercast.server.settings import ModelSettings, default_cache
from layercast.server.work import Work

_SECONDS = 1.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet")
    parser.add_argument("--repository", type=Path, help="a repository with the model (default: the zoo, exported)")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--max-batch", type=int, default=128)
    parser.add_argument("--precision", default="fp32,bf16")
    args = parser.parse_args()
    if not cuda.count():
        print(f"gpu.py: nothing to measure, {environment.cuda_status()}", file=sys.stderr)
        return 1
    print(environment.cuda_status())
    with tempfile.TemporaryDirectory() as folder:
        root = args.repository or Path(folder) / "models"
        if not args.repository:
            write_repository(root, default_cache())
        versions = [path for path in (root / args.model).iterdir() if path.name.isdigit()]
        directory = max(versions, key=lambda path: int(path.name))
        for precision in args.precision.split(","):
            settings = ModelSettings(
                device=args.device, precision=precision, max_batch=args.max_batch, max_delay_ms=0, queue_rows=1 << 20
            )
            asyncio.run(_measure(directory, settings))
    return 0


async def _measure(directory: Path, settings: ModelSettings) -> None:
    trust = Trust.of([ARTEFACT_CODE])
    of_graphs = settings.model_copy(update={"engine": "eager"})
    eager = load(directory, of_graphs, environment.cpu_budget(), trust).runner.eager
    assert eager is not None
    print(f"\n{directory.parent.name}, {settings.precision}, {settings.device}\n")
    print("| rows | layer by layer, rows/s | CUDA graph, rows/s |\n|---:|---:|---:|")
    sizes = [1 << power for power in range(settings.max_batch.bit_length()) if 1 << power <= settings.max_batch]
    graphs = [_rate(eager.run, _inputs(eager, size), size) for size in sizes]
    eager.forget_graphs()
    for size, graph in zip(sizes, graphs, strict=True):
        print(f"| {size} | {_rate(eager.run, _inputs(eager, size), size):,.0f} | {graph:,.0f} |")
    loaded = load(directory, settings, environment.cpu_budget(), trust)
    monitor = ModelMonitor(Metrics(), loaded.manifest.name, "1", "cuda", loaded.limits)
    model = ServedModel(loaded, monitor)
    try:
        await _served(model, settings.max_batch)
    finally:
        await model.batcher.close()


async def _served(model: ServedModel, size: int) -> None:
    """Keep two batches of single rows in flight: one computes, one waits."""
    one = {name: array[:1] for name, array in _inputs(model.loaded.runner.eager, 1).items()}
    full = {name: np.repeat(array, size, axis=0) for name, array in one.items()}
    alone = size / _rate(model.loaded.runner.fast.run, full, size)
    until, statistics_ = time.perf_counter() + 3 * _SECONDS, model.monitor.statistics

    async def ask() -> None:
        while time.perf_counter() < until:
            work = Work(one, 1, "k", bytes=sum(array.nbytes for array in one.values()))
            await model.batcher.submit([work])

    wall, processor = time.perf_counter(), time.process_time()
    await asyncio.gather(*(ask() for _ in range(2 * size)))
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    batches, inferences = statistics_.executions, statistics_.inferences
    print(f"\nengines: {model.loaded.engines}")
    print(f"in process, {size} rows: {size / alone:,.0f} rows/s, {alone * 1e6:,.0f} us a batch")
    print(
        f"through the batcher, single rows: {inferences / wall:,.0f} rows/s in batches of {inferences / batches:.1f}, "
        f"{wall / batches * 1e6:,.0f} us a batch: the server adds {(wall / batches - alone) * 1e6:,.0f} us; "
        f"a processor works {processor / batches * 1e6:,.0f} us"
    )


def _inputs(eager: EagerEngine | None, size: int) -> dict[str, np.ndarray]:
    assert eager is not None
    manifest: Manifest = eager.manifest
    return {
        spec.name: rows(spec.datatype, (size, *(48 if dimension == -1 else dimension for dimension in spec.shape[1:])))
        for spec in manifest.inputs
    }


def _rate(run: Callable[[Any], Any], inputs: dict[str, np.ndarray], size: int) -> float:
    for _ in range(5):
        run(inputs)
    durations, until = [], time.perf_counter() + _SECONDS
    while time.perf_counter() < until or len(durations) < 10:
        start = time.perf_counter()
        run(inputs)
        durations.append(time.perf_counter() - start)
    return size / statistics.median(durations)


if __name__ == "__main__":
    sys.exit(main())
