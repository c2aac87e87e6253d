"""What layers cost: taps against plain forwards, early exits, reducers, and plain batches beside them.

    python benchmarks/features.py [--seconds 8]

In one process and one thread, by CPU time, the compared runs in turn; all figures are ratios of medians of one run.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from layercast.models import registry
from layercast.models.examples import Examples
from layercast.models.export.writer import export_artefact
from layercast.server.engines.base import Inputs
from layercast.server.engines.eager import EagerEngine
from layercast.server.loader import load
from layercast.server.runner import Runner
from layercast.server.settings import ModelSettings
from layercast.server.work import Tap, Work

ROWS = 16
CARDS = {
    "resnet": ("ResNetLike", {}, {"name": "image", "datatype": "FP32", "shape": [-1, 3, 32, 32]}),
    "transformer": (
        "TransformerEncoder",
        {},
        {"name": "tokens", "datatype": "INT64", "shape": [-1, -1], "range": [0, 256], "pad": 256, "max_length": 128},
    ),
    "mnist": ("MNISTClassifier", {}, {"name": "image", "datatype": "FP32", "shape": [-1, 1, 28, 28]}),
}
TAPS = {"resnet": "layer2", "transformer": "blocks.1", "mnist": "net.2"}
EARLY = {"resnet": ("layer1.0", "layer1"), "transformer": ("blocks.0",), "mnist": ("net.0",)}
OUTPUTS = {"resnet": 10, "transformer": 2, "mnist": 10}


def runner_of(name: str, root: Path) -> Runner:
    """Export the untrained architecture and load it as the server does."""
    architecture, arguments, given = CARDS[name]
    torch.manual_seed(0)
    card = {"name": name, "architecture": architecture, "arguments": arguments, "inputs": [given]}
    card["outputs"] = [{"name": "logits", "datatype": "FP32", "shape": [-1, OUTPUTS[name]]}]
    directory = root / name / "1"
    export_artefact(registry.build(architecture, **arguments).eval(), card, directory, programs=("torchscript",))
    return load(directory, ModelSettings(engine="torchscript"), threads=1).runner


def medians(runs: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Return the median CPU time of each run, in seconds, all of them in turn for so long."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for name, run in runs.items():
            start = time.process_time()
            run()
            taken[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in taken.items()}


def measure(name: str, runner: Runner, seconds: float) -> None:
    """Print the ratios of one model."""
    eager = runner.eager
    if not isinstance(eager, EagerEngine):
        raise TypeError("this is a bug: no eager engine")
    examples = Examples(eager.manifest.inputs)
    inputs: Inputs = {n: t.numpy() for n, t in examples.make(ROWS, examples.lengths()[-1]).items()}
    pooled = [Tap(TAPS[name], "mean")]
    every = [Tap(layer.path, "mean") for layer in eager.manifest.layers if layer.available]
    work = Work(inputs, ROWS, None)
    exits = {layer: partial(eager.tapped, inputs, [Tap(layer, "mean")], predict=False) for layer in EARLY[name]}
    plain = partial(eager.run, inputs)
    found = medians(
        {
            "eager": plain,
            "one pooled tap": partial(eager.tapped, inputs, pooled, predict=True),
            "every layer pooled": partial(eager.tapped, inputs, every, predict=True),
            "fast engine": partial(runner.fast.run, inputs),
            "plain batch": partial(runner, [work]),
            **exits,
        },
        seconds,
    )
    sizes = [eager.tapped(inputs, [tap], False)[1][tap].nbytes for tap in (Tap(TAPS[name]), *pooled)]
    whole = found["eager"]
    print(f"{name}, {ROWS} rows: a plain eager forward takes {whole * 1000:.2f} ms of CPU")
    print(f"  {found['one pooled tap'] / whole:.3f} of it with {TAPS[name]}@mean beside the prediction")
    print(f"  {found['every layer pooled'] / whole:.3f} of it with all {len(every)} layers @mean beside the prediction")
    for layer, run in exits.items():
        share = operations(run) / operations(plain)
        print(f"  {found[layer] / whole:.3f} of it for {layer}@mean alone, {share:.3f} of the multiplications")
    print(f"  {found['plain batch'] / found['fast engine']:.3f} of the fast engine's run for a batch without taps")
    print(f"  {sizes[0]:,} bytes for {TAPS[name]} whole, {sizes[1]:,} as @mean")


def operations(run: Callable[[], object]) -> int:
    """Return how many floating-point operations torch counts in matrix products and convolutions."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def main() -> None:
    """Measure every model for so many seconds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=8.0, help="for each model")
    seconds = parser.parse_args().seconds
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for name in CARDS:
            measure(name, runner_of(name, Path(folder)), seconds)


if __name__ == "__main__":
    main()
