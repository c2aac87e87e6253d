"""Which engines an artefact can have, and loading them."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import torch

from layercast.models.artefact import assert_eval, load_module
from layercast.models.foreign.trust import Trust
from layercast.models.manifest import Manifest
from layercast.server.engines import programs
from layercast.server.engines.base import Engine, EngineError
from layercast.server.engines.choice import Candidate
from layercast.server.engines.confined import Confined
from layercast.server.engines.eager import EagerEngine
from layercast.server.engines.encoder.engine import EncoderEngine
from layercast.server.engines.native.engine import NativeEngine, why_not
from layercast.server.engines.onnx import OnnxEngine
from layercast.server.engines.winograd.engine import WinogradEngine
from layercast.server.settings import EngineName, ModelSettings, Precision

logger = logging.getLogger(__name__)

# torch.export programs load slowly and run as eager does here; they are used when asked for.
_TRIED: Final[tuple[EngineName, ...]] = ("onnx", "torchscript")
_NATIVE: Final[tuple[EngineName, ...]] = ("winograd", "encoder")
"""Engines on kernels of layercast's own, for a part of the program `onnx`. That a model does not fit one is no news."""

_OF_RUNTIME: Final[tuple[EngineName, ...]] = ("onnx", "onnx-int8")
"""Engines of ONNX Runtime, whose sessions have a number of threads each. Others are loaded once for any."""

_CODE: Final[tuple[EngineName, ...]] = ("torchscript", "exported")
"""Programs that are code: of artefacts that are not trusted they run only when asked for by name."""


@dataclass(frozen=True)
class Source:
    """An artefact to load engines from; `untrusted` says why its module may not be built, "" when it may.

    An engine computes with `threads` threads at most.
    """

    directory: Path
    manifest: Manifest
    device: torch.device
    threads: int
    trust: Trust
    untrusted: str
    precision: Precision = "fp32"

    def eager(self) -> EagerEngine | None:
        """Return the engine that layers need, or None for code that is not trusted."""
        if self.untrusted:
            return None
        module = load_module(self.directory, self.manifest, self.trust)
        assert_eval(module)
        return EagerEngine(module, self.manifest, self.device, self.precision)

    def candidates(self, settings: ModelSettings) -> list[Candidate]:
        """Return what may run plain predictions, the likeliest first.

        EngineError when the engine that is asked for is not to be had, or none is.
        """
        asked = settings.engine
        if asked == "eager" and self.untrusted:
            raise EngineError(f"engine eager is asked for, but {self.untrusted}")
        if settings.precision == "bf16" and self.untrusted:
            raise EngineError(f"precision bf16 needs engine eager, but {self.untrusted}")
        if ("onnx" if asked in _NATIVE else asked) not in ("auto", "eager", *self.manifest.programs):
            which = "program onnx" if asked in _NATIVE else "such program"
            raise EngineError(f"engine {asked} is asked for, but the artefact has no {which}")
        if asked in _NATIVE and (reason := self._without(asked)):
            raise EngineError(f"engine {asked} is asked for, but {reason}")
        names = [asked] if asked != "auto" else self._of_auto(settings)
        return [Candidate(name, threads) for name in names for threads in self._threads(name)]

    def engines(self, candidates: Iterable[Candidate], eager: EagerEngine | None) -> dict[Candidate, Engine]:
        """Load the engines of `candidates`; one that can't be had here is left out with a line in the log.

        EngineError when that is so of all.
        """
        engines: dict[Candidate, Engine] = {}
        shared: dict[EngineName, Engine] = {"eager": eager} if eager else {}
        failed: dict[EngineName, EngineError] = {}
        for candidate in candidates:
            name = candidate.engine
            try:
                if name in _OF_RUNTIME:
                    engines[candidate] = self._program(candidate)
                    continue
                if name in failed:
                    raise failed[name]
                if name not in shared:
                    shared[name] = self._program(candidate)
                engines[candidate] = self.confined(shared[name], candidate)
            except EngineError as error:
                level = logging.DEBUG if name in _NATIVE else logging.WARNING
                logger.log(level, "%s: engine %s left out: %s", self.manifest.name, candidate, error)
                failed[name] = error.with_traceback(None)  # it would keep this frame, and so every engine
        if failed and not engines:
            raise failed[name]
        return engines

    def confined(self, engine: Engine, candidate: Candidate) -> Engine:
        """Return `engine`, torch's or on our own kernel, so that it computes with the candidate's threads."""
        if isinstance(engine, NativeEngine):
            return engine.with_threads(candidate.threads)
        return engine if candidate.threads == self.threads else Confined(engine, candidate.threads)

    def _of_auto(self, settings: ModelSettings) -> list[EngineName]:
        if settings.precision == "bf16":
            return ["eager"]
        # What TorchScript and torch.export programs can do as they load and run is not bounded: reading files, for one.
        names: list[EngineName] = [
            name for name in _TRIED if name in self.manifest.programs and not (self.untrusted and name in _CODE)
        ]
        if "onnx" in names:
            at = names.index("onnx") + 1
            names[at:at] = [name for name in _NATIVE if not self._without(name)]
        if settings.allow_int8 and "onnx-int8" in self.manifest.programs and self.device.type == "cpu":
            names.append("onnx-int8")
        if not self.untrusted:
            names.append("eager")
        if not names:
            others = " or ".join(name for name in _CODE if name in self.manifest.programs)
            also = f", or set engine to {others}, whose program can run code" if others else ""
            raise EngineError(f"no program of it can run without its module, and {self.untrusted}{also}")
        return names

    def _without(self, name: EngineName) -> str:
        """Return why the engine `name`, one of `_NATIVE`, can't run here, whatever the model; "" where it can."""
        if self.device.type != "cpu":
            return 'it runs on the CPU; set device = "cpu" for this model'
        return why_not(name)

    def _threads(self, name: EngineName) -> list[int]:
        """Return how many threads are worth trying: waking another costs what a small batch does."""
        return [1, self.threads] if self.threads > 1 and self.device.type == "cpu" else [self.threads]

    def _program(self, candidate: Candidate) -> Engine:
        if candidate.engine == "torchscript":
            return programs.torchscript(self.directory, self.manifest, self.device)
        if candidate.engine == "exported":
            return programs.exported(self.directory, self.manifest, self.device)
        if candidate.engine == "winograd":
            return WinogradEngine(self.directory, self.manifest)
        if candidate.engine == "encoder":
            return EncoderEngine(self.directory, self.manifest)
        name: Literal["onnx", "onnx-int8"] = "onnx-int8" if candidate.engine == "onnx-int8" else "onnx"
        return OnnxEngine(self.directory, self.manifest, self.device, candidate.threads, name)
