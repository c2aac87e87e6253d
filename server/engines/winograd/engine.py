"""Engine on the library for convolutions, with ONNX Runtime for what lies before and behind them."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from layercast.models.manifest import Manifest
from layercast.server.engines.base import EngineError
from layercast.server.engines.native.engine import NativeEngine, Part, example
from layercast.server.engines.native.kernel import Crew, Kernel
from layercast.server.engines.winograd.body import body_of
from layercast.server.engines.winograd.library import NAME, library
from layercast.server.engines.winograd.plan import Plan, Shape, Workspace
from layercast.server.work import Array


class WinogradEngine(NativeEngine[Workspace]):
    """Runs the convolutions of the program `onnx` by Winograd's algorithm."""

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        """As NativeEngine."""
        super().__init__(NAME, directory, manifest)

    def _load(self, content: bytes, manifest: Manifest, path: Path) -> tuple[Kernel, Part]:
        loaded = library(path)
        body = body_of(content, loaded.panel)
        if body is None:
            raise EngineError(f"it has no 3x3 convolution of stride 1 to a multiple of {loaded.panel} channels")
        for spec in manifest.inputs:
            if spec.dynamic_dimensions():
                raise EngineError(f"input {spec.name!r} is not of one size")
        self._start = body.start
        part = Part(content, manifest, [body.start], body.end)
        images = part.before(example(manifest, 1))[body.start]
        if images.dtype != np.float32 or images.ndim != 4 or len(images) != 1:
            raise EngineError(f"its convolutions begin with {images.dtype} {list(images.shape)} for one row")
        self._plan = Plan(loaded, body, Shape(*images.shape[1:]))
        return loaded.kernel, part

    def _most_threads(self) -> int:
        return self._plan.most_threads

    def _memory(self, crew: Crew) -> Workspace:
        return self._plan.workspace(crew)

    def _compute(self, values: Mapping[str, Array], crew: Crew, memory: Workspace) -> Array:
        return self._plan.run(values[self._start], memory)
