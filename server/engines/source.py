"""Which engines an artefact can have, and loading them."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import torch

from layercast.models.artefact import assert_eval, load_module
from layercast.models.foreign.trust import Trust
from layercast.models.manifest import Manifest, Program
from layercast.server.engines import programs
from layercast.server.engines.base import Engine, EngineError
from layercast.server.engines.choice import Candidate
from layercast.server.engines.confined import Confined
from layercast.server.engines.eager import EagerEngine
from layercast.server.engines.onnx import OnnxEngine
from layercast.server.engines.winograd import library
from layercast.server.engines.winograd.engine import WinogradEngine
from layercast.server.settings import EngineName, ModelSettings, Precision

logger = logging.getLogger(__name__)

# torch.export programs load slowly and run as eager does here; they are used when asked for.
_TRIED: Final[tuple[EngineName, ...]] = ("onnx", "torchscript")
_OWN: Final[tuple[EngineName, ...]] = ("onnx", "onnx-int8", "winograd")
"""Engines that see to their threads themselves. Torch's take those of the thread that runs them."""

_RARE: Final[tuple[EngineName, ...]] = ("winograd",)
"""Engines that few models fit: that one does not is no news."""

_PROGRAMS: Final[dict[EngineName, Program]] = {"winograd": "onnx"}
"""The program that an engine reads, where its name is another."""

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
        if _PROGRAMS.get(asked, asked) not in ("auto", "eager", *self.manifest.programs):
            which = f"program {_PROGRAMS[asked]}" if asked in _PROGRAMS else "such program"
            raise EngineError(f"engine {asked} is asked for, but the artefact has no {which}")
        if asked == "winograd" and (reason := self._without_winograd()):
            raise EngineError(f"engine winograd is asked for, but {reason}")
        names = [asked] if asked != "auto" else self._of_auto(settings)
        return [Candidate(name, threads) for name in names for threads in self._threads(name)]

    def engines(self, candidates: Iterable[Candidate], eager: EagerEngine | None) -> dict[Candidate, Engine]:
        """Load the engines of `candidates`; one that can't be had here is left out with a line in the log.

        EngineError when that is so of all.
        """
        engines: dict[Candidate, Engine] = {}
        in_torch: dict[EngineName, Engine] = {}
        failed: EngineError | None = None
        for candidate in candidates:
            try:
                if candidate.engine in _OWN:
                    engines[candidate] = self._program(candidate)
                    continue
                if candidate.engine not in in_torch:
                    given = eager if candidate.engine == "eager" else None
                    in_torch[candidate.engine] = given or self._program(candidate)
                engines[candidate] = self.confined(in_torch[candidate.engine], candidate)
            except EngineError as error:
                level = logging.DEBUG if candidate.engine in _RARE else logging.WARNING
                logger.log(level, "%s: engine %s left out: %s", self.manifest.name, candidate, error)
                failed = error
        if failed and not engines:
            raise failed
        return engines

    def confined(self, engine: Engine, candidate: Candidate) -> Engine:
        """Return torch's `engine` so that it computes with the candidate's threads: those it would use, or fewer."""
        return engine if candidate.threads == self.threads else Confined(engine, candidate.threads)

    def _of_auto(self, settings: ModelSettings) -> list[EngineName]:
        if settings.precision == "bf16":
            return ["eager"]
        # What TorchScript and torch.export programs can do as they load and run is not bounded: reading files, for one.
        names: list[EngineName] = [
            name for name in _TRIED if name in self.manifest.programs and not (self.untrusted and name in _CODE)
        ]
        if "onnx" in names and not self._without_winograd():
            names.insert(names.index("onnx") + 1, "winograd")
        if settings.allow_int8 and "onnx-int8" in self.manifest.programs and self.device.type == "cpu":
            names.append("onnx-int8")
        if not self.untrusted:
            names.append("eager")
        if not names:
            others = " or ".join(name for name in _CODE if name in self.manifest.programs)
            also = f", or set engine to {others}, whose program can run code" if others else ""
            raise EngineError(f"no program of it can run without its module, and {self.untrusted}{also}")
        return names

    def _without_winograd(self) -> str:
        """Return why engine winograd can't run here, whatever the model; "" where it can."""
        if self.device.type != "cpu":
            return 'it runs on the CPU; set device = "cpu" for this model'
        return library.why_not()

    def _threads(self, name: EngineName) -> list[int]:
        """Return how many threads are worth trying: waking another costs what a small batch does."""
        if name == "winograd":
            return [1]
        return [1, self.threads] if self.threads > 1 and self.device.type == "cpu" else [self.threads]

    def _program(self, candidate: Candidate) -> Engine:
        if candidate.engine == "torchscript":
            return programs.torchscript(self.directory, self.manifest, self.device)
        if candidate.engine == "exported":
            return programs.exported(self.directory, self.manifest, self.device)
        if candidate.engine == "winograd":
            return WinogradEngine(self.directory, self.manifest)
        name: Literal["onnx", "onnx-int8"] = "onnx-int8" if candidate.engine == "onnx-int8" else "onnx"
        return OnnxEngine(self.directory, self.manifest, self.device, candidate.threads, name)
