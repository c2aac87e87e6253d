"""How throughput and latency change as the work grows: more callers, more rows, more models, larger features.

    python benchmarks/curves.py [--front-ends direct,envoy] [--only concurrency] --output benchmarks/pictures

Writes one picture and the figures (JSON) for each curve. Load and server share the machine; every point is one server
under one load, its answers checked before and after.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

import matplotlib as mpl
import numpy as np
from load import Load, Server, loaded, started
from side_by_side import machine, serve_command
from workloads import Workload, write_repository

from layercast.models.manifest import Manifest
from layercast.server.settings import default_cache

CONCURRENCY: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
ROWS: Final = (1, 4, 16, 64, 256, 1024)
MODELS: Final = (1, 10, 25, 50)
FEATURES: Final = (
    ("layer2@mean@proj64", 1),
    ("layer2@mean", 1),
    ("layer2", 1),
    ("layer1", 1),
    ("layer1", 4),
    ("layer1", 16),
)

Point = tuple[float, Load]
Curve = Callable[["Setting"], dict[str, list[Point]]]


class Setting:
    """The servers and how long each point is loaded."""

    def __init__(self, repository: Path, args: argparse.Namespace) -> None:
        self.repository = repository
        self.seconds: int = args.seconds
        self.front_ends: list[str] = args.front_ends.split(",")
        self.args = args

    def points(self, front_end: str, workloads: Iterable[tuple[float, Workload]], repository: Path) -> list[Point]:
        """Load one server with every workload in turn."""
        server = Server(front_end, serve_command(repository, front_end, 8700, self.args), 8700)
        found = []
        with started(server) as (channel, process, ready_s):
            for x, workload in workloads:
                load = loaded(server, channel, process, ready_s, workload, self.seconds, [])
                print(f"{front_end:8} {workload.name:45} {load.rate:9.0f}/s  p99 {load.p99_ms:8.2f} ms", flush=True)
                found.append((x, load))
        return found


def concurrency(setting: Setting) -> dict[str, list[Point]]:
    """More callers, each with one request of one row in flight."""
    workloads = [(float(n), Workload("mnist", (1, 1, 28, 28), n)) for n in CONCURRENCY]
    return {each: setting.points(each, workloads, setting.repository) for each in setting.front_ends}


def rows(setting: Setting) -> dict[str, list[Point]]:
    """More rows a request, four requests in flight; the rate is in rows."""
    workloads = [(float(n), Workload("mnist", (n, 1, 28, 28), 4)) for n in ROWS]
    return {
        each: [(x, load.times(x)) for x, load in setting.points(each, workloads, setting.repository)]
        for each in setting.front_ends
    }


def models(setting: Setting) -> dict[str, list[Point]]:
    """More models loaded, one of them asked: the others should cost it nothing."""
    found: dict[str, list[Point]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for count in MODELS:
            root = Path(folder) / str(count)
            _copies(setting.repository / "mnist" / "1", root, count)
            for each in setting.front_ends:
                workload = Workload("mnist", (1, 1, 28, 28), 16)
                found.setdefault(each, []).extend(setting.points(each, [(float(count), workload)], root))
    return found


def features(setting: Setting) -> dict[str, list[Point]]:
    """Larger features: bytes of one answer, from a mean to maps of many rows."""
    manifest = Manifest.read(setting.repository / "resnet" / "1")
    workloads = []
    for tap, count in FEATURES:
        path, _, reducer = tap.partition("@")
        channels, *space = manifest.layers_by_path[path].shape[1:]
        size = 64 if "proj64" in reducer else channels if reducer else channels * int(np.prod(space))
        workloads.append((float(4 * size * count), Workload("resnet", (count, 3, 32, 32), 4, f"layer:{tap}")))
    return {
        each: setting.points(each, sorted(workloads, key=lambda found: found[0]), setting.repository)
        for each in setting.front_ends
    }


CURVES: Final[dict[str, tuple[Curve, str, str]]] = {
    "concurrency": (concurrency, "requests in flight", "requests/s"),
    "rows": (rows, "rows a request", "rows/s"),
    "models": (models, "models loaded, one of them asked", "requests/s"),
    "features": (features, "bytes of features an answer", "requests/s"),
}


def main() -> int:
    """Measure and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--front-ends", default="direct,grpcio,envoy")
    parser.add_argument("--only", choices=CURVES, action="append")
    parser.add_argument("--seconds", type=int, default=3)
    parser.add_argument("--cache", type=Path, default=default_cache())
    parser.add_argument("--serve", default="", help="more options of `layercast serve`")
    parser.add_argument("--output", type=Path, required=True, help="folder for pictures and figures")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        repository = Path(folder) / "models"
        write_repository(repository, args.cache)
        setting = Setting(repository, args)
        for name in args.only or CURVES:
            measure, x, y = CURVES[name]
            found = measure(setting)
            draw(found, x, y, args.output / f"{name}.png")
            points = {each: [{"x": at, **load.json()} for at, load in curve] for each, curve in found.items()}
            text = json.dumps({"machine": machine(), "x": x, "y": y, "points": points}, indent=1)
            (args.output / f"{name}.json").write_text(text + "\n")
    return 0


def draw(curves: dict[str, list[Point]], x: str, y: str, path: Path) -> None:
    """Write a picture of two charts with a common x axis: rate above, 99th percentile of the latency below."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (rate, latency) = plt.subplots(2, 1, sharex=True, figsize=(7, 5.5), layout="constrained")
    for name, points in curves.items():
        at = [value for value, _ in points]
        rate.plot(at, [load.rate for _, load in points], "o-", label=name)
        latency.plot(at, [load.p99_ms for _, load in points], "o-", label=name)
    rate.set(ylabel=y, xscale="log")
    rate.set_ylim(bottom=0)
    latency.set(ylabel="p99, ms", xlabel=x, xscale="log", yscale="log")
    for axes in (rate, latency):
        axes.grid(visible=True, which="major", alpha=0.3)
    rate.legend()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _copies(source: Path, root: Path, count: int) -> None:
    """Put `count` models into `root`: the artefact `source` under its own name and under others."""
    manifest = Manifest.read(source)
    for number in range(count):
        name = manifest.name if not number else f"{manifest.name}-{number}"
        target = root / name / "1"
        shutil.copytree(source, target)
        manifest.model_copy(update={"name": name}).write(target)


if __name__ == "__main__":
    sys.exit(main())
