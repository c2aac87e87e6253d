"""Loading one version: verify, load, check eval mode, reproduce the golden outputs, choose the engine, warm up."""

import logging
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np
import torch

from layercast.models.artefact import Golden, assert_eval, golden, load_module
from layercast.models.manifest import Manifest
from layercast.server.engines import programs
from layercast.server.engines.base import Engine, EngineError, Inputs
from layercast.server.engines.eager import EagerEngine
from layercast.server.engines.onnx import OnnxEngine
from layercast.server.model import Loaded
from layercast.server.runner import Runner
from layercast.server.settings import ModelSettings

logger = logging.getLogger(__name__)

_TOLERANCE: Final = 1e-3
_TIMED_ROWS: Final = 8
_TIMED_RUNS: Final = 7
# torch.export programs load slowly and run as eager does here; they are used when asked for.
_CANDIDATES: Final = ("onnx", "torchscript")


class LoadError(Exception):
    """A version can't be served; the text says why, without paths, since clients read it in the repository index."""


def load(directory: Path, settings: ModelSettings, threads: int) -> Loaded:
    """Load the artefact in `directory`, ready to answer. Blocks for seconds: call it in a thread.

    Raises LoadError for a file that differs from the manifest, a module in training mode, outputs that differ from
    the golden ones, or an engine or device that is not to be had.
    """
    start = time.perf_counter()
    try:
        manifest = Manifest.read(directory)
        device = choose_device(settings.device)
        engines = _engines(directory, manifest, settings, device, threads)
        recorded = golden(directory, manifest)
        manifest.verify_rest(directory)  # what was loaded was verified as it was read
    except (ValueError, OSError, RuntimeError, EngineError) as error:
        raise LoadError(_without_paths(str(error), directory)) from error
    for engine in engines.values():
        _check_golden(engine, recorded)
    timed = {name: _time(engine, _rows(recorded.inputs, _TIMED_ROWS)) for name, engine in engines.items()}
    fast = min(timed, key=lambda name: timed[name]) if settings.engine == "auto" else settings.engine
    logger.info("%s: %s", manifest.name, ", ".join(f"{name} {ms:.2f} ms" for name, ms in timed.items()))
    eager = engines["eager"]
    if not isinstance(eager, EagerEngine):
        raise TypeError("this is a bug: the eager engine is of another class")
    runner = Runner(manifest, engines[fast], eager)
    _time(runner.fast, _rows(recorded.inputs, settings.max_batch), runs=1)
    warmup_ms = _time(runner.fast, _rows(recorded.inputs, 1))
    return Loaded(manifest, settings, runner, time.perf_counter() - start, warmup_ms)


def choose_device(name: str) -> torch.device:
    """Return the device for the setting `auto`, `cpu` or `cuda`; EngineError when CUDA is wanted and absent."""
    if name == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    if name == "cuda":
        raise EngineError("device is set to cuda, but torch finds no CUDA device here; set it to auto or cpu")
    return torch.device("cpu")


def _engines(
    directory: Path, manifest: Manifest, settings: ModelSettings, device: torch.device, threads: int
) -> dict[str, Engine]:
    """Load the eager engine, which layers need, and the engines that may serve plain predictions."""
    module = load_module(directory, manifest)
    assert_eval(module)
    loaders: dict[str, Callable[[], Engine]] = {
        "eager": lambda: EagerEngine(module.to(device), manifest, device),
        "torchscript": lambda: programs.torchscript(directory, manifest, device),
        "exported": lambda: programs.exported(directory, manifest, device),
        "onnx": lambda: OnnxEngine(directory, manifest, device, threads),
    }
    wanted: list[str] = ["eager"]
    if settings.engine == "auto":
        wanted += [name for name in _CANDIDATES if name in manifest.programs]
    elif settings.engine != "eager":
        wanted.append(settings.engine)
    engines: dict[str, Engine] = {}
    for name in wanted:
        try:
            engines[name] = loaders[name]()
        except EngineError as error:
            if settings.engine != "auto":
                raise
            logger.warning("%s: engine %s left out: %s", manifest.name, name, error)
        except KeyError:
            raise EngineError(f"engine {name} is asked for, but the artefact has no such program") from None
    return engines


def _check_golden(engine: Engine, recorded: Golden) -> None:
    """Raise LoadError unless the engine reproduces the outputs that the export recorded."""
    try:
        got = engine.run(recorded.inputs)
    except Exception as error:
        lines = str(error).splitlines()
        raise LoadError(
            f"engine {engine.name} failed on the golden inputs: {type(error).__name__}: {lines[0] if lines else ''}"
        ) from error
    for name, wanted in recorded.outputs.items():
        where = f"engine {engine.name}, output {name!r}"
        if name not in got:
            raise LoadError(f"{where}: the engine does not give it; it gives {', '.join(got) or 'nothing'}")
        values = got[name]
        for what, want, came in (
            ("shape", list(wanted.shape), list(values.shape)),
            ("dtype", str(wanted.dtype), str(values.dtype)),
        ):
            if want != came:
                raise LoadError(f"{where}: want {what} {want} as recorded at the export, got {came}")
        if not np.allclose(values, wanted, rtol=_TOLERANCE, atol=_TOLERANCE):
            worst = float(np.max(np.abs(values.astype("f8") - wanted.astype("f8"))))
            how = "is not a number where" if np.isnan(worst) else f"differs by up to {worst:.3g} from what"
            raise LoadError(f"{where} {how} the export recorded; export the model again")


def _rows(inputs: Inputs, count: int) -> Inputs:
    return {name: np.resize(array, (count, *array.shape[1:])) for name, array in inputs.items()}


def _time(engine: Engine, inputs: Inputs, runs: int = _TIMED_RUNS) -> float:
    """Return the median duration of a warm run, in milliseconds."""
    engine.run(inputs)
    durations = []
    for _ in range(runs):
        start = time.perf_counter()
        engine.run(inputs)
        durations.append(time.perf_counter() - start)
    return statistics.median(durations) * 1000


def _without_paths(text: str, directory: Path) -> str:
    return text.replace(f"{directory}/", "").replace(str(directory), directory.name).splitlines()[0]
