"""What a layer costs by hooks on the module and by a part of the ONNX program, in process, on the zoo.

Both read the same rows in turn, on one thread, and the processor time of each forward is taken, reducers included. Run
it with `python benchmarks/onnx_layers.py`; the first time it exports the zoo into a temporary folder.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from layercast.models import zoo
from layercast.models.artefact import load_module
from layercast.models.examples import Examples
from layercast.models.manifest import Manifest
from layercast.server.engines.base import Inputs, Tapping
from layercast.server.engines.eager import EagerEngine
from layercast.server.engines.taps import OnnxProgram
from layercast.server.work import Tap

CASES = (
    ("mnist", ("net.0",), False),
    ("mnist", ("net.4",), True),
    ("resnet", ("layer2@mean",), False),
    ("resnet", ("layer1",), False),
    ("resnet", ("layer1.0.bn1@mean",), False),
    ("resnet", ("layer1@mean", "layer2@mean"), True),
    ("transformer", ("blocks.0",), False),
    ("transformer", ("blocks.1@mean",), False),
    ("transformer", ("blocks.0@mean", "blocks.1@mean"), True),
)
ROWS, LENGTH = (1, 8, 32), 64


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=21, help="of each way and size; the median counts")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        repository = zoo.ensure_exported(folder)
        _print_coverage(repository)
        print("| model | layers | " + " | ".join(f"{rows} rows" for rows in ROWS) + " |")
        for name, taps, predict in CASES:
            cells = _measured(
                repository / name / "1", [Tap(*tap.partition("@")[::2]) for tap in taps], predict, args.runs
            )
            print(f"| `{name}` | `{'`, `'.join(taps)}`{' and outputs' if predict else ''} | {' | '.join(cells)} |")


def _print_coverage(repository: Path) -> None:
    for name in zoo.names():
        manifest = Manifest.read(repository / name / "1")
        print(f"{name}: {len(manifest.onnx_values)} of {sum(layer.available for layer in manifest.layers)} layers")


def _measured(directory: Path, taps: list[Tap], predict: bool, runs: int) -> list[str]:
    """Return milliseconds by hooks, by the program, and how many times faster that is, for every number of rows."""
    taps = [Tap(tap.layer, tap.reducer or "none") for tap in taps]
    manifest = Manifest.read(directory)
    hooks = EagerEngine(load_module(directory, manifest), manifest, torch.device("cpu"))
    part = OnnxProgram(directory, manifest, 1).part({tap.layer for tap in taps}, predict)
    cells = []
    for rows in ROWS:
        inputs = {name: tensor.numpy() for name, tensor in Examples(manifest.inputs).make(rows, LENGTH).items()}
        eager, onnx = _interleaved([_reading(way, inputs, taps, predict) for way in (hooks, part)], runs)
        cells.append(f"{eager:.2f} → {onnx:.2f} ({eager / onnx:.1f}×)")
    return cells


def _reading(way: Tapping, inputs: Inputs, taps: list[Tap], predict: bool) -> Callable[[], object]:
    return lambda: way.tapped(inputs, taps, predict)


def _interleaved(ways: list[Callable[[], object]], runs: int) -> list[float]:
    """Return the median processor time of each way in milliseconds."""
    taken: list[list[float]] = [[] for _ in ways]
    for run in range(runs + 2):
        for way, times in zip(ways, taken, strict=True):
            start = time.process_time()
            way()
            if run > 1:  # warm
                times.append(time.process_time() - start)
    return [statistics.median(times) * 1000 for times in taken]


if __name__ == "__main__":
    main()
