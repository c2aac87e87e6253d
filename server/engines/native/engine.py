"""A part of the program `onnx` on a kernel of layercast's own, with ONNX Runtime for what lies before and behind it."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Final, Generic, Self, TypeVar

from layercast.models.artefact import to_numpy
from layercast.models.examples import Examples
from layercast.models.manifest import Manifest
from layercast.models.onnx_cut import CutError, cut, remaining
from layercast.server import compiled
from layercast.server.engines.base import EngineError, Inputs, Outputs, not_loaded
from layercast.server.engines.native.kernel import Crew, Kernel
from layercast.server.engines.onnx import open_session
from layercast.server.work import Array

if TYPE_CHECKING:
    from layercast.models.onnx_runtime import onnxruntime

PROGRAM: Final = "onnx"
_MOST_THREADS: Final = 64
_MOST_BYTES: Final = 128 << 20
"""Larger programs are not cut: Python's lock is kept meanwhile."""


class Part:
    """What ONNX Runtime computes around the part of a program that reads the values `reads` and gives `end`.

    `types` are ONNX's element types of those of which the program may not say it.
    """

    def __init__(
        self, content: bytes, manifest: Manifest, reads: Sequence[str], end: str, types: Mapping[str, int] | None = None
    ) -> None:
        """CutError and EngineError where the program can't be taken apart so."""
        given = {spec.name for spec in manifest.inputs}
        self._made = [name for name in reads if name not in given]
        self._given = [name for name in reads if name in given]
        self._head = _session(cut(content, self._made, types)) if self._made else None
        self._end = end
        self._outputs = [spec.name for spec in manifest.outputs]
        self._tail = None if [end] == self._outputs else _session(remaining(content, end))
        self._behind = [value.name for value in self._tail.get_inputs()] if self._tail else []

    def before(self, inputs: Inputs) -> dict[str, Array]:
        """Return what the part reads, by name."""
        values = {name: inputs[name] for name in self._given}
        if self._head:
            values |= zip(self._made, self._head.run(self._made, dict(inputs)), strict=True)
        return values

    def behind(self, value: Array, inputs: Inputs) -> Outputs:
        """Return every output, where the part gave `value`."""
        if self._tail is None:
            return {self._end: value}
        values = {name: value if name == self._end else inputs[name] for name in self._behind}
        return dict(zip(self._outputs, self._tail.run(self._outputs, values), strict=True))


Memory = TypeVar("Memory")


class NativeEngine(ABC, Generic[Memory]):
    """An engine on the kernel `name`, which computes with the thread that calls.

    A run leaves nothing that another, at the same time in another thread, sees: each has `Memory` of its own.
    """

    def __init__(self, name: str, directory: Path, manifest: Manifest) -> None:
        """EngineError where there is no kernel for this processor, and for a model that the kernel does not fit."""
        self.name: str = name
        self.device = "cpu"
        path = compiled.kernel(name)
        if path is None:
            raise EngineError(f"engine {name} is not to be had: {why_not(name)}")
        if manifest.files[manifest.programs[PROGRAM]].bytes > _MOST_BYTES:
            raise EngineError(f"engine {name} takes programs of up to {_MOST_BYTES >> 20} MB")
        content = manifest.read_verified(directory, manifest.programs[PROGRAM])
        try:
            self._kernel, self._part = self._load(content, manifest, path)
        except (CutError, EngineError) as error:
            raise EngineError(f"engine {name} can't run it: {error}") from error
        except Exception as error:  # of a program that only a checker would refuse, or a library that is broken
            raise not_loaded(f"engine {name}", error, str(path)) from error
        self._crew = self._kernel.crew(1)
        self._free: list[Memory] = []

    def with_threads(self, threads: int) -> Self:
        """Return this engine so that up to `threads` threads share a batch, the calling one among them."""
        other = copy(self)
        other._crew = self._kernel.crew(min(threads, self._most_threads()))
        other._free = []
        return other

    def shrink(self) -> None:
        """Give back what earlier batches took and is kept for the next."""
        self._free.clear()

    def _most_threads(self) -> int:
        """Return how many threads at most may share a batch."""
        return _MOST_THREADS

    @abstractmethod
    def _load(self, content: bytes, manifest: Manifest, library: Path) -> tuple[Kernel, Part]:
        """Prepare the kernel in `library` for a part of the program in `content`, and return both.

        CutError and EngineError where the kernel does not fit.
        """

    def run(self, inputs: Inputs) -> Outputs:
        """Return every output for the batch."""
        values = self._part.before(inputs)
        try:
            memory = self._free.pop()
        except IndexError:  # more threads run than ever before
            memory = self._memory(self._crew)
        results = self._compute(values, self._crew, memory)
        self._free.append(memory)
        return self._part.behind(results, inputs)

    @abstractmethod
    def _memory(self, crew: Crew) -> Memory:
        """Return what one run at a time by `crew` computes in."""

    @abstractmethod
    def _compute(self, values: Mapping[str, Array], crew: Crew, memory: Memory) -> Array:
        """Return what the part gives for the `values` that it reads."""


def why_not(name: str) -> str:
    """Return why the kernel `name` can't run here, "" where it can."""
    if compiled.kernel(name) is None:
        return "its kernel is not compiled (`layercast compile`, on x86-64 with AVX2 or AVX-512)"
    return ""


def example(manifest: Manifest, rows: int) -> Inputs:
    """Return inputs to find the sizes inside of a program by."""
    examples = Examples(manifest.inputs)
    return {name: to_numpy(tensor) for name, tensor in examples.make(rows, examples.lengths()[0], "zeros").items()}


def _session(content: bytes) -> "onnxruntime.InferenceSession":
    return open_session(content, PROGRAM, 1)
