"""What torch's inductor would be worth as an engine, beside those that are served.

    python benchmarks/inductor.py REPOSITORY transformer 48

`aoti` is the torch.export program compiled ahead of time (AOTInductor), `compile` the module through torch.compile,
weights frozen; both need a C++ compiler. Of each batch: milliseconds on one thread, and the longest gap in another
Python thread, as the event loop is one.
"""

import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
import torch._inductor.config
from workloads import rows

from layercast.models.artefact import load_module
from layercast.models.foreign.trust import ARTEFACT_CODE, Trust
from layercast.models.manifest import Manifest
from layercast.server.engines.onnx import OnnxEngine

Run = Callable[[torch.Tensor], object]


def main() -> None:
    """Compile, measure and print."""
    repository, model, shape = sys.argv[1:]
    torch.set_num_threads(1)
    manifest = Manifest.read(directory := Path(repository) / model / "1")
    spec, row = manifest.inputs[0], [int(size) for size in shape.split(",")]
    module = load_module(directory, manifest, Trust.of([ARTEFACT_CODE]))
    onnx = OnnxEngine(directory, manifest, torch.device("cpu"), 1)
    torch._inductor.config.freezing = True
    ways: dict[str, Run] = {"onnx": lambda x: onnx.run({spec.name: x.numpy()}), "eager": module}
    ways |= {"torchscript": torch.jit.load(directory / "model.ts"), "aoti": _ahead_of_time(directory / "model.pt2")}
    ways |= {"compile": torch.compile(module, dynamic=True)}
    with torch.inference_mode():
        for batch in (1, 8, 16, 32):
            x = torch.from_numpy(rows(spec.datatype, (batch, *row)))
            print(batch, "rows: ", ", ".join(f"{name} {_measured(run, x)}" for name, run in ways.items()), flush=True)


def _ahead_of_time(program: Path) -> Run:
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        package = Path(folder) / "model.pt2"
        torch._inductor.aoti_compile_and_package(torch.export.load(program), package_path=str(package))
        print(f"compiled in {time.perf_counter() - start:.0f} s, {package.stat().st_size / 1e6:.1f} MB")
        return torch._inductor.aoti_load_package(str(package))


def _measured(run: Run, x: torch.Tensor, seconds: float = 1.5) -> str:
    for _ in range(3):
        run(x)
    ticks, taken, over = [time.perf_counter()], [], threading.Event()
    other = threading.Thread(target=_tick, args=(ticks, over))
    other.start()
    while (start := time.perf_counter()) < ticks[0] + seconds:
        run(x)
        taken.append(time.perf_counter() - start)
    over.set()
    other.join()
    gap = max(after - before for before, after in pairwise(ticks))
    return f"{1e3 * statistics.median(taken):.2f} (gap {1e3 * gap:.0f})"


def _tick(ticks: list[float], over: threading.Event) -> None:
    while not over.wait(2e-4):
        ticks.append(time.perf_counter())


if __name__ == "__main__":
    main()
