"""Engine on the library for transformer encoders, with ONNX Runtime for what lies before and behind their blocks."""

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import numpy as np

from layercast.models.manifest import Manifest
from layercast.server.engines.base import EngineError
from layercast.server.engines.encoder.body import body_of
from layercast.server.engines.encoder.library import NAME, library
from layercast.server.engines.encoder.plan import Memory, Plan
from layercast.server.engines.native.engine import NativeEngine, Part, example
from layercast.server.engines.native.kernel import Crew, Kernel
from layercast.server.work import Array

_FLOAT: Final = 1
_INT32: Final = 6
"""Of onnx.TensorProto.DataType."""


class EncoderEngine(NativeEngine[Memory]):
    """Runs whole blocks of the transformer encoder in the program `onnx`."""

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        """As NativeEngine."""
        super().__init__(NAME, directory, manifest)

    def _load(self, content: bytes, manifest: Manifest, path: Path) -> tuple[Kernel, Part]:
        loaded = library(path)
        lanes = loaded.kernel.lanes
        body = body_of(content, lanes)
        if body is None:
            raise EngineError(f"it has no fused self-attention with heads of a multiple of {lanes} numbers")
        types = {body.start: _FLOAT} | dict.fromkeys(body.masks, _INT32) | dict.fromkeys(body.factors, _FLOAT)
        part = Part(content, manifest, list(types), body.end, types)
        values = part.before(example(manifest, 2))
        start = values[body.start]
        if start.dtype != np.float32 or start.ndim != 3:
            raise EngineError(f"its blocks begin with {start.dtype} {list(start.shape)} for two rows")
        self._plan = Plan(loaded, body, start.shape[2])
        # What the program says nothing of may be of other shapes than the library wants.
        self._plan.run(values, loaded.kernel.crew(1), Memory())
        return loaded.kernel, part

    def _memory(self, crew: Crew) -> Memory:
        return Memory()

    def _compute(self, values: Mapping[str, Array], crew: Crew, memory: Memory) -> Array:
        return self._plan.run(values, crew, memory)
