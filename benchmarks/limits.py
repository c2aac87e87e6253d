"""What each engine reaches in process, on both sides of the wire nothing: rows/s over the best batch.

    python benchmarks/limits.py --repository DIR --model resnet --shape 1,3,32,32 [--layer layer2@mean]

Prints a JSON object: engine -> rows/s. `eager-tapped` is torch with the layer read and the forward stopped there;
`winograd` and `encoder` are there if their kernels are compiled and fit the model.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from workloads import rows

from layercast.models.artefact import load_module
from layercast.models.foreign.trust import ARTEFACT_CODE, Trust
from layercast.models.manifest import Manifest
from layercast.server import compiled
from layercast.server.engines.base import EngineError
from layercast.server.engines.eager import EagerEngine
from layercast.server.engines.encoder.engine import EncoderEngine
from layercast.server.engines.onnx import open_session
from layercast.server.engines.winograd.engine import WinogradEngine
from layercast.server.settings import read
from layercast.server.work import Tap

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repository", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--shape", required=True)
    parser.add_argument("--layer", default="")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batches", default=",".join(map(str, BATCHES)))
    args = parser.parse_args()
    shape = tuple(int(size) for size in args.shape.split(","))[1:]
    torch.set_num_threads(args.threads)
    directory = max((args.repository / args.model).iterdir(), key=lambda path: int(path.name) if path.is_dir() else 0)
    engines = _engines(directory, args.threads, args.layer)
    batches = [int(size) for size in args.batches.split(",")]
    print(json.dumps({name: _best(run, spec, shape, batches) for name, (run, spec) in engines.items()}))


def _engines(directory: Path, threads: int, layer: str) -> dict[str, tuple[Callable[[np.ndarray], Any], str]]:
    manifest = Manifest.read(directory)
    spec = manifest.inputs[0]
    module = load_module(directory, manifest, Trust.of([ARTEFACT_CODE]))
    if layer:
        path, _, reducer = layer.partition("@")
        eager, taps = EagerEngine(module, manifest, torch.device("cpu")), [Tap(path, reducer or "none")]
        return {
            "eager-tapped": (lambda x: eager.tapped({spec.name: x}, taps, predict=False), spec.datatype),
            "eager": (lambda x: module(torch.from_numpy(x)), spec.datatype),
        }
    session = open_session((directory / "model.onnx").read_bytes(), "model.onnx", threads)
    scripted = torch.jit.load(str(directory / "model.ts"))
    engines: dict[str, tuple[Callable[[np.ndarray], Any], str]] = {
        "onnx": (lambda x: session.run(None, {spec.name: x}), spec.datatype),
        "eager": (lambda x: module(torch.from_numpy(x)), spec.datatype),
        "torchscript": (lambda x: scripted(torch.from_numpy(x)), spec.datatype),
    }
    compiled.look_in(read({}).compiled)
    for native in (WinogradEngine, EncoderEngine):
        with suppress(EngineError):
            engine = native(directory, manifest).with_threads(threads)
            engines[engine.name] = (lambda x, engine=engine: engine.run({spec.name: x}), spec.datatype)
    return engines


def _best(run: Callable[[np.ndarray], Any], datatype: str, shape: tuple[int, ...], batches: list[int]) -> float:
    rates = []
    with torch.inference_mode():
        for batch in batches:
            x = rows(datatype, (batch, *shape))
            for _ in range(3):
                run(x)
            rates.append(batch / statistics.median(_timed(run, x)))
    return round(max(rates), 1)


def _timed(run: Callable[[np.ndarray], Any], x: np.ndarray, seconds: float = 0.7) -> list[float]:
    times, until = [], time.perf_counter() + seconds
    while time.perf_counter() < until or len(times) < 3:
        start = time.perf_counter()
        run(x)
        times.append(time.perf_counter() - start)
    return times


if __name__ == "__main__":
    main()
