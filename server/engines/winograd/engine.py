"""Engine on the library for convolutions, with ONNX Runtime for what lies before and behind them."""

from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import torch

from layercast.models.datatypes import TORCH_DTYPES
from layercast.models.manifest import Manifest, TensorSpec
from layercast.models.onnx_cut import CutError, cut, remaining
from layercast.server import compiled
from layercast.server.engines.base import EngineError, Inputs, Outputs, not_loaded
from layercast.server.engines.onnx import open_session
from layercast.server.engines.winograd.body import body_of
from layercast.server.engines.winograd.library import NAME, Library, library, why_not
from layercast.server.engines.winograd.plan import Plan, Shape, Workspace
from layercast.server.work import Array

if TYPE_CHECKING:
    from layercast.models.onnx_runtime import onnxruntime

_PROGRAM: Final = "onnx"
_MOST_BYTES: Final = 128 << 20
"""Larger programs are not cut: Python's lock is kept meanwhile."""


class WinogradEngine:
    """Runs the convolutions of the program `onnx` by Winograd's algorithm, with the thread that calls.

    A run leaves nothing behind that another, at the same time in another thread, could see.
    """

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        """EngineError where there is no kernel for this processor, and for a model that is no such network."""
        self.name: str = NAME
        self.device = "cpu"
        path = compiled.kernel(NAME)
        if path is None:
            raise EngineError(f"engine {NAME} is not to be had: {why_not()}")
        if manifest.files[manifest.programs[_PROGRAM]].bytes > _MOST_BYTES:
            raise EngineError(f"engine {NAME} takes programs of up to {_MOST_BYTES >> 20} MB")
        content = manifest.read_verified(directory, manifest.programs[_PROGRAM])
        try:
            self._load(content, manifest, library(path))
        except (CutError, EngineError) as error:
            raise EngineError(f"engine {NAME} can't run it: {error}") from error
        except Exception as error:  # of a program that only a checker would refuse, or a library that is broken
            raise not_loaded(f"engine {NAME}", error, str(path)) from error
        self._free: list[Workspace] = []

    def _load(self, content: bytes, manifest: Manifest, kernel: Library) -> None:
        body = body_of(content, kernel.panel)
        if body is None:
            raise EngineError(f"it has no 3x3 convolution of stride 1 to a multiple of {kernel.panel} channels")
        self._outputs = [spec.name for spec in manifest.outputs]
        self._start, self._end = body.start, body.end
        within = body.start in {spec.name for spec in manifest.inputs}
        self._head = None if within else _session(cut(content, [body.start]))
        self._tail = None if [body.end] == self._outputs else _session(remaining(content, body.end))
        self._read = [value.name for value in self._tail.get_inputs()] if self._tail else []
        self._plan = Plan(kernel, body, self._shape(manifest))

    def run(self, inputs: Inputs) -> Outputs:
        """Return every output for the batch."""
        images = self._before(inputs)
        try:
            workspace = self._free.pop()
        except IndexError:  # more threads run than ever before
            workspace = self._plan.workspace()
        maps = self._plan.run(images, workspace)
        self._free.append(workspace)
        if self._tail is None:
            return {self._end: maps}
        values = {name: maps if name == self._end else inputs[name] for name in self._read}
        return dict(zip(self._outputs, self._tail.run(self._outputs, values), strict=True))

    def _before(self, inputs: Inputs) -> Array:
        """Return what the convolutions begin with."""
        return inputs[self._start] if self._head is None else np.asarray(self._head.run([self._start], dict(inputs))[0])

    def _shape(self, manifest: Manifest) -> Shape:
        """Return the shape of that; what comes before it is asked with one row of zeros."""
        images = self._before({spec.name: _zeros(spec) for spec in manifest.inputs})
        if images.dtype != np.float32 or images.ndim != 4 or len(images) != 1:
            raise EngineError(f"its convolutions begin with {images.dtype} {list(images.shape)} for one row")
        return Shape(*images.shape[1:])


def _zeros(spec: TensorSpec) -> Array:
    if spec.datatype not in TORCH_DTYPES or spec.datatype == "BF16" or spec.dynamic_dimensions():
        raise EngineError(f"input {spec.name!r} is no array of numbers of one size")
    return torch.zeros((1, *spec.shape[1:]), dtype=TORCH_DTYPES[spec.datatype]).numpy()


def _session(content: bytes) -> "onnxruntime.InferenceSession":
    return open_session(content, _PROGRAM, 1)
