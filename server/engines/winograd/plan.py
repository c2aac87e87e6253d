"""Where the maps of a body lie, and with which weights each of its steps is called."""

import ctypes
from collections import defaultdict
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from layercast.server.engines.base import EngineError
from layercast.server.engines.winograd import packing
from layercast.server.engines.winograd.body import Body, Convolution
from layercast.server.engines.winograd.library import Library, Map, Step

Floats = NDArray[np.float32]

_GROUP: Final = 4
"""Images that go through all steps together, so that their maps stay in the cache from step to step,"""
_GROUP_BYTES: Final = 32 << 20
"""or fewer, where they are large."""
_TILES: Final = 60
"""Tiles that are transformed together, a multiple of the rows that the kernel multiplies at once,"""
_TILE_CHANNELS: Final = _TILES * 128
"""or fewer of many channels: the second-level cache is to hold them."""
_ROWS: Final = 6
_POSITIONS: Final = (packing.TILE + 2) ** 2


class Shape(NamedTuple):
    """Channels, height and width of a map."""

    channels: int
    height: int
    width: int

    @property
    def lines(self) -> int:
        """Lines in memory: tiles cover the image, and reach a line further on both sides."""
        return -(-self.height // packing.TILE) * packing.TILE + 2

    @property
    def pitch(self) -> int:
        """The same for columns."""
        return -(-self.width // packing.TILE) * packing.TILE + 2

    @property
    def size(self) -> int:
        """Numbers in memory."""
        return self.channels * self.lines * self.pitch


class Plan:
    """The steps of a body for maps of one shape; what it keeps is never changed."""

    def __init__(self, library: Library, body: Body, start: Shape) -> None:
        """EngineError where the library can't compute a step."""
        self._library = library
        self._body = body
        self.shapes = _shapes(body, start, library.panel)
        self._packed = [_packed(step, library) for step in body.steps]
        self._bias = [_kept(step.bias) for step in body.steps]
        image = 4 * sum(shape.size for shape in self.shapes.values())
        self.group = max(1, min(_GROUP, _GROUP_BYTES // image))

    @property
    def end(self) -> Shape:
        """What comes out."""
        return self.shapes[self._body.end]

    def workspace(self) -> "Workspace":
        """Return the memory for one run at a time."""
        return Workspace(self)

    def run(self, images: Floats, workspace: "Workspace") -> Floats:
        """Return the body's end, [rows, channels, height, width], of `images`, which are so too, in order."""
        results = np.empty((len(images), *self.end), np.float32)
        self._library.run(
            workspace.steps, len(self._body.steps), images.ctypes.data, len(images), self.group,
            workspace.scratch.ctypes.data, results.ctypes.data,
        )  # fmt: skip
        return results

    def steps(self, maps: dict[str, Floats]) -> "ctypes.Array[Step]":
        """Return the steps as the library reads them, on these maps."""

        def place(name: str) -> Map:
            shape = self.shapes[name]
            return Map(_address(maps[name]), shape.height, shape.width, shape.lines, shape.pitch, shape.channels)

        every = [
            Step(
                place(step.source), place(step.target), place(step.shortcut) if step.shortcut else Map(),
                _address(weights), _address(bias), step.kernel, step.stride, step.relu, block,
            )
            for step, (weights, block), bias in zip(self._body.steps, self._packed, self._bias, strict=True)
        ]  # fmt: skip
        return (Step * len(every))(*every)

    def maps(self) -> dict[str, Floats]:
        """Return memory for every value. Those of one shape share it where their times do not meet.

        Only those: what is zero around an image stays zero then.
        """
        free: dict[Shape, list[Floats]] = defaultdict(list)
        found = {self._body.start: packing.aligned(self.group * self.shapes[self._body.start].size)}
        last = {name: at for at, step in enumerate(self._body.steps) for name in (step.source, step.shortcut) if name}
        for at, step in enumerate(self._body.steps):
            shape = self.shapes[step.target]
            found[step.target] = free[shape].pop() if free[shape] else packing.aligned(self.group * shape.size)
            for name in {step.source, step.shortcut} - {"", self._body.start}:
                if last[name] == at:
                    free[self.shapes[name]].append(found[name])
        return found

    @property
    def scratch(self) -> int:
        """Numbers that the largest step keeps besides."""
        return max(
            _POSITIONS * (block * sum(step.weights.shape[:2]) + 2 * self._library.lanes)
            for step, (_, block) in zip(self._body.steps, self._packed, strict=True)
        )


class Workspace:
    """The memory of one run."""

    def __init__(self, plan: Plan) -> None:
        self._maps = plan.maps()
        self.scratch = packing.aligned(plan.scratch)
        self.steps = plan.steps(self._maps)


def _shapes(body: Body, start: Shape, panel: int) -> dict[str, Shape]:
    shapes = {body.start: start}
    for step in body.steps:
        out, into = step.weights.shape[:2]
        source = shapes[step.source]
        if into != source.channels or len(step.bias) != out:
            raise EngineError(f"a convolution of {into} channels follows one of {source.channels}")
        if out % panel:
            raise EngineError(f"it has a convolution to {out} channels, which is no multiple of {panel}")
        shape = Shape(out, -(-source.height // step.stride), -(-source.width // step.stride))
        if step.shortcut and shapes[step.shortcut] != shape:
            raise EngineError("it adds maps of different shapes")
        shapes[step.target] = shape
    return shapes


def _packed(step: Convolution, library: Library) -> tuple[Floats, int]:
    """Return the weights, and how many tiles are transformed together: 0 for a step that is computed directly."""
    out, into = step.weights.shape[:2]
    if not step.by_tiles or into % library.lanes:
        return packing.direct(step.weights, library.panel), 0
    block = min(_TILES, _TILE_CHANNELS // max(out, into)) // _ROWS * _ROWS
    return packing.transformed(step.weights, library.panel), max(_ROWS, block)


def _kept(values: Floats) -> Floats:
    kept = packing.aligned(values.size)
    kept[:] = values
    return kept


def _address(array: Floats) -> int:
    return int(array.ctypes.data)
