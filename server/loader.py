"""Loading one version: verify, load, check eval mode, reproduce the golden outputs, choose the engine, warm up."""

import logging
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np
import torch

from layercast.models.artefact import NO_TRUST, Golden, assert_eval, golden, load_module, refusal
from layercast.models.foreign.trust import Trust
from layercast.models.manifest import WEIGHTS_FILE, Manifest
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


def load(directory: Path, settings: ModelSettings, threads: int, trust: Trust = NO_TRUST) -> Loaded:
    """Load the artefact in `directory`, ready to answer. Blocks for seconds: call it in a thread.

    A module whose code is not layercast's own and not in `trust` is not built: its exported programs answer, and all
    its layers are marked unavailable with the reason. Raises LoadError for a file that differs from the manifest, code
    that does not give a module, one in training mode, outputs that differ from the golden ones, or an engine or device
    that is not to be had.
    """
    start = time.perf_counter()
    try:
        manifest = Manifest.read(directory)
        manifest.verify_files(directory)
        device = choose_device(settings.device)
        untrusted = refusal(manifest, trust)
        eager = None if untrusted else _eager(directory, manifest, device, trust)
        engines = _engines(directory, manifest, settings, device, threads, eager, untrusted)
        recorded = golden(directory, manifest)
    except (ValueError, OSError, RuntimeError, EngineError) as error:
        raise LoadError(_without_paths(str(error), directory)) from error
    for engine in engines.values():
        _check_golden(engine, recorded, manifest)
    timed = {name: _time(engine, _rows(recorded.inputs, _TIMED_ROWS)) for name, engine in engines.items()}
    fast = min(timed, key=lambda name: timed[name]) if settings.engine == "auto" else settings.engine
    logger.info("%s: %s", manifest.name, ", ".join(f"{name} {ms:.2f} ms" for name, ms in timed.items()))
    if untrusted:
        logger.warning("%s: layers are not available: %s", manifest.name, untrusted)
        manifest = _without_layers(manifest, untrusted)
    runner = Runner(manifest, engines[fast], eager)
    _time(runner.fast, _rows(recorded.inputs, settings.max_batch), runs=1)
    warmup_ms = _time(runner.fast, _rows(recorded.inputs, 1))
    memory = eager.memory_bytes if eager else manifest.files[WEIGHTS_FILE].bytes
    note = f"layers are not available: {untrusted}" if untrusted else ""
    return Loaded(manifest, settings, runner, time.perf_counter() - start, warmup_ms, memory, note)


def choose_device(name: str) -> torch.device:
    """Return the device for the setting `auto`, `cpu` or `cuda`; EngineError when CUDA is wanted and absent."""
    if name == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    if name == "cuda":
        raise EngineError("device is set to cuda, but torch finds no CUDA device here; set it to auto or cpu")
    return torch.device("cpu")


def _eager(directory: Path, manifest: Manifest, device: torch.device, trust: Trust) -> EagerEngine:
    module = load_module(directory, manifest, trust)
    assert_eval(module)
    return EagerEngine(module.to(device), manifest, device)


def _engines(
    directory: Path,
    manifest: Manifest,
    settings: ModelSettings,
    device: torch.device,
    threads: int,
    eager: EagerEngine | None,
    untrusted: str,
) -> dict[str, Engine]:
    """Load the engines that may serve plain predictions; `untrusted` says why there is no eager one."""
    loaders: dict[str, Callable[[], Engine]] = {
        "torchscript": lambda: programs.torchscript(directory, manifest, device),
        "exported": lambda: programs.exported(directory, manifest, device),
        "onnx": lambda: OnnxEngine(directory, manifest, device, threads),
        "onnx-int8": lambda: OnnxEngine(directory, manifest, device, threads, "onnx-int8"),
    }
    wanted: list[str] = [settings.engine]
    if settings.engine == "auto":
        wanted = [name for name in _CANDIDATES if name in manifest.programs]
    engines: dict[str, Engine] = {"eager": eager} if eager else {}
    for name in wanted:
        if name == "eager":
            continue
        try:
            engines[name] = loaders[name]()
        except EngineError as error:
            if settings.engine != "auto":
                raise
            logger.warning("%s: engine %s left out: %s", manifest.name, name, error)
        except KeyError:
            raise EngineError(f"engine {name} is asked for, but the artefact has no such program") from None
    if settings.engine == "eager" and untrusted:
        raise EngineError(f"engine eager is asked for, but {untrusted}")
    if not engines:
        also = ", or set engine to exported, whose program can run code as it loads" * ("exported" in manifest.programs)
        raise EngineError(f"no program of it can run without its module, and {untrusted}{also}")
    return engines


def _without_layers(manifest: Manifest, reason: str) -> Manifest:
    """Return `manifest` with every layer marked unavailable for `reason`, unless it has a reason of its own."""
    layers = tuple(
        layer.model_copy(update={"available": False, "reason": reason}) if layer.available else layer
        for layer in manifest.layers
    )
    return Manifest.model_validate(manifest.model_dump() | {"layers": layers})


def _check_golden(engine: Engine, recorded: Golden, manifest: Manifest) -> None:
    """Raise LoadError unless the engine reproduces the recorded outputs; int8, as nearly as the export found."""
    tolerance = manifest.int8.tolerance if manifest.int8 and engine.name == "onnx-int8" else _TOLERANCE
    got = engine.run(recorded.inputs)
    for name, wanted in recorded.outputs.items():
        if got[name].shape != wanted.shape:
            raise LoadError(
                f"engine {engine.name}, output {name!r}: want shape {list(wanted.shape)} as recorded at the export, "
                f"got {list(got[name].shape)}"
            )
        if not np.allclose(got[name], wanted, rtol=_TOLERANCE, atol=tolerance):
            worst = float(np.max(np.abs(got[name].astype("f8") - wanted.astype("f8"))))
            raise LoadError(
                f"engine {engine.name}, output {name!r} differs from the golden output by up to {worst:.3g}; "
                f"export the model again"
            )


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
