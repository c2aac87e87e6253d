"""Loading one version: verify, load, check eval mode, reproduce the golden outputs, choose the engine, warm up."""

import logging
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch

from layercast.models.artefact import NO_TRUST, Golden, assert_eval, golden, load_module, refusal
from layercast.models.foreign.trust import Trust
from layercast.models.manifest import Manifest
from layercast.server import tapping
from layercast.server.engines import programs
from layercast.server.engines.base import Engine, EngineError, Inputs, Tapping
from layercast.server.engines.eager import EagerEngine
from layercast.server.engines.onnx import OnnxEngine
from layercast.server.model import Loaded
from layercast.server.runner import Runner
from layercast.server.settings import EngineName, ModelSettings

logger = logging.getLogger(__name__)

_TOLERANCE: Final = 1e-3
_TIMED_ROWS: Final = 8
_TIMED_RUNS: Final = 7
# torch.export programs load slowly and run as eager does here; they are used when asked for.
_CANDIDATES: Final[tuple[EngineName, ...]] = ("onnx", "torchscript")
_CODE: Final[tuple[EngineName, ...]] = ("torchscript", "exported")
"""Programs that are code: of artefacts that are not trusted they run only when asked for by name."""


class LoadError(Exception):
    """A version can't be served; the text says why, without paths, since clients read it in the repository index."""


@dataclass(frozen=True)
class _Source:
    """An artefact to load engines from; `untrusted` says why its module may not be built, "" when it may."""

    directory: Path
    manifest: Manifest
    device: torch.device
    threads: int
    trust: Trust
    untrusted: str

    def eager(self) -> EagerEngine | None:
        """Return the engine that layers need, or None for code that is not trusted."""
        if self.untrusted:
            return None
        module = load_module(self.directory, self.manifest, self.trust)
        assert_eval(module)
        return EagerEngine(module.to(self.device), self.manifest, self.device)

    def program(self, name: EngineName) -> Engine:
        """Return the engine that runs the program `name`; KeyError when the artefact has none."""
        if name == "torchscript":
            return programs.torchscript(self.directory, self.manifest, self.device)
        if name == "exported":
            return programs.exported(self.directory, self.manifest, self.device)
        if name == "onnx-int8":
            return OnnxEngine(self.directory, self.manifest, self.device, self.threads, "onnx-int8")
        return OnnxEngine(self.directory, self.manifest, self.device, self.threads)


def load(directory: Path, settings: ModelSettings, threads: int, trust: Trust = NO_TRUST) -> Loaded:
    """Load the artefact in `directory`, ready to answer. Blocks for seconds: call it in a thread.

    A module whose code is not layercast's own and not in `trust` is not built: its exported programs answer, and its
    layers without a value in the ONNX program are marked unavailable with the reason. `threads` are what this process
    may use; the model's instances share them evenly, at least one each. Raises LoadError for a file that differs from
    the manifest, code that does not give a module, one in training mode, outputs that differ from the golden ones, or
    an engine or device that is not to be had.
    """
    start = time.perf_counter()
    own = max(1, threads // settings.instances)
    # Torch counts threads per thread, and gives a new one what was set last anywhere.
    torch.set_num_threads(own)
    with _told(directory):
        manifest = Manifest.read(directory)
        device = choose_device(settings.device)
        source = _Source(directory, manifest, device, own, trust, refusal(manifest, trust))
        engines = _engines(source, settings.engine)
        recorded = golden(directory, manifest)
        manifest.verify_files(directory)  # what was loaded was verified as it was read
    for engine in engines.values():
        _check_golden(engine, recorded, manifest)
    fast = _fastest(manifest, engines, recorded) if settings.engine == "auto" else settings.engine
    program = tapping.program(directory, manifest, device, own, settings.engine)
    taps, note = tapping.chosen(engines.get("eager"), program, recorded), ""
    if source.untrusted:
        manifest, note = tapping.without_module(manifest, taps, source.untrusted)
        logger.warning("%s: %s", manifest.name, note)
    runners = [_runner(manifest, engines, fast, taps)]
    for _ in range(1, settings.instances):
        with _told(directory):
            others = _engines(source, fast)
        taps = tapping.chosen(others.get("eager"), program, recorded)
        runners.append(_runner(manifest, others, fast, taps))
        _check_golden(runners[-1].fast, recorded, manifest)
    for runner in runners:
        _time(runner.fast, _rows(recorded.inputs, settings.max_batch), runs=1)
    warmup_ms = _time(runners[0].fast, _rows(recorded.inputs, 1))
    return Loaded(manifest, settings, tuple(runners), own, time.perf_counter() - start, warmup_ms, note)


@contextmanager
def _told(directory: Path) -> Iterator[None]:
    """Turn what reading an artefact raises into a LoadError."""
    try:
        yield
    except (ValueError, OSError, RuntimeError, EngineError) as error:
        raise LoadError(_without_paths(str(error), directory)) from error


def _fastest(manifest: Manifest, engines: dict[EngineName, Engine], recorded: Golden) -> EngineName:
    """Return the name of the engine that runs a small batch in the shortest time."""
    timed = {name: _time(engine, _rows(recorded.inputs, _TIMED_ROWS)) for name, engine in engines.items()}
    logger.info("%s: %s", manifest.name, ", ".join(f"{name} {ms:.2f} ms" for name, ms in timed.items()))
    return min(timed, key=lambda name: timed[name])


def _runner(manifest: Manifest, engines: dict[EngineName, Engine], fast: EngineName, taps: Tapping | None) -> Runner:
    eager = engines.get("eager")
    if eager is not None and not isinstance(eager, EagerEngine):
        raise TypeError("this is a bug: the eager engine is of another class")
    return Runner(manifest, engines[fast], eager, taps)


def choose_device(name: str) -> torch.device:
    """Return the device for the setting `auto`, `cpu` or `cuda`; EngineError when CUDA is wanted and absent."""
    if name == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    if name == "cuda":
        raise EngineError("device is set to cuda, but torch finds no CUDA device here; set it to auto or cpu")
    return torch.device("cpu")


def _engines(source: _Source, asked: EngineName) -> dict[EngineName, Engine]:
    """Load the engine `asked` for, or the candidates of `auto`, beside the eager one where it may be had."""
    manifest, untrusted = source.manifest, source.untrusted
    eager = source.eager()
    engines: dict[EngineName, Engine] = {"eager": eager} if eager else {}
    # What TorchScript and torch.export programs can do as they load and run is not bounded: reading files, for one.
    candidates = [name for name in _CANDIDATES if name in manifest.programs and not (untrusted and name in _CODE)]
    wanted = candidates if asked == "auto" else [asked]
    for name in wanted:
        if name == "eager":
            continue
        try:
            engines[name] = source.program(name)
        except EngineError as error:
            if asked != "auto":
                raise
            logger.warning("%s: engine %s left out: %s", manifest.name, name, error)
        except KeyError:
            raise EngineError(f"engine {name} is asked for, but the artefact has no such program") from None
    if asked == "eager" and untrusted:
        raise EngineError(f"engine eager is asked for, but {untrusted}")
    if not engines:
        others = " or ".join(name for name in _CODE if name in manifest.programs)
        also = f", or set engine to {others}, whose program can run code" if others else ""
        raise EngineError(f"no program of it can run without its module, and {untrusted}{also}")
    return engines


def _check_golden(engine: Engine, recorded: Golden, manifest: Manifest) -> None:
    """Raise LoadError unless the engine reproduces the recorded outputs; int8, as nearly as the export found."""
    tolerance = manifest.int8.tolerance if manifest.int8 and engine.name == "onnx-int8" else _TOLERANCE
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
        if not np.allclose(values, wanted, rtol=_TOLERANCE, atol=tolerance):
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
