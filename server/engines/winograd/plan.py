"""Where the maps of a body lie, and with which weights each of its steps is called."""

import ctypes
from collections import defaultdict
from typing import Final, NamedTuple

import numpy as np

from layercast.server.engines.base import EngineError
from layercast.server.engines.native.kernel import Crew
from layercast.server.engines.native.memory import Floats, address, aligned, kept
from layercast.server.engines.winograd import packing
from layercast.server.engines.winograd.body import Body, Convolution
from layercast.server.engines.winograd.library import Library, Map, Member, Step
from layercast.server.work import Array

_GROUP: Final = 4
"""Images that go through all steps together, so that their maps stay in the cache from step to step,"""
_GROUP_BYTES: Final = 32 << 20
"""or fewer, where they are large."""
_MOST_BYTES: Final = 1 << 29
"""Of the maps of an image, for all threads: no number that the library counts with comes near 2^31."""
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


class _Call(NamedTuple):
    """One step: the names of its maps ("" for no shortcut), its weights as the library reads them, and the rest.

    `block` tiles are transformed together; 0 for a step that is computed directly.
    """

    source: str
    target: str
    shortcut: str
    weights: Floats
    bias: Floats
    kernel: int
    stride: int
    relu: bool
    block: int


class Plan:
    """The steps of a body for maps of one shape; what it keeps is never changed."""

    def __init__(self, library: Library, body: Body, start: Shape) -> None:
        """EngineError where the library can't compute a step."""
        self._library = library
        self._start, self._end = body.start, body.end
        self.shapes = _shapes(body, start, library.panel)
        image = 4 * sum(shape.size for shape in self.shapes.values())
        if image > _MOST_BYTES:
            raise EngineError(f"its maps take {image >> 20:,} MB an image, more than {_MOST_BYTES >> 20:,}")
        self.most_threads = _MOST_BYTES // image
        """That may share a batch, since each has maps of its own."""
        self.group = max(1, min(_GROUP, _GROUP_BYTES // image))
        self._calls = [_call(step, library) for step in body.steps]

    @property
    def end(self) -> Shape:
        """What comes out."""
        return self.shapes[self._end]

    def workspace(self, crew: Crew) -> "Workspace":
        """Return the memory for one run at a time by `crew`."""
        return Workspace(self, crew)

    def run(self, images: Array, workspace: "Workspace") -> Floats:
        """Return the body's end, [rows, channels, height, width], of `images`, which are so too.

        EngineError for images that are not as the plan was made for: the library would read what is none.
        """
        if images.dtype != np.float32 or images.shape[1:] != tuple(self.shapes[self._start]):
            want = [-1, *self.shapes[self._start]]
            raise EngineError(f"convolutions: want FP32 {want}, got {images.dtype} {list(images.shape)}")
        images = np.ascontiguousarray(images)
        results = np.empty((len(images), *self.end), np.float32)
        crew = workspace.crew
        self._library.run(
            workspace.members, len(self._calls), images.ctypes.data, len(images), crew.group(self.group, len(images)),
            results.ctypes.data, crew.pointer,
        )  # fmt: skip
        return results

    def steps(self, maps: dict[str, Floats]) -> "ctypes.Array[Step]":
        """Return the steps as the library reads them, on these maps."""

        def place(name: str) -> Map:
            shape = self.shapes[name]
            return Map(address(maps[name]), shape.height, shape.width, shape.lines, shape.pitch, shape.channels)

        every = [
            Step(
                place(call.source), place(call.target), place(call.shortcut) if call.shortcut else Map(),
                address(call.weights), address(call.bias), call.kernel, call.stride, call.relu, call.block,
            )
            for call in self._calls
        ]  # fmt: skip
        return (Step * len(every))(*every)

    def maps(self) -> dict[str, Floats]:
        """Return memory for every value. Those of one shape share it where their times do not meet.

        Only those: what is zero around an image stays zero then.
        """
        free: dict[Shape, list[Floats]] = defaultdict(list)
        found = {self._start: aligned(self.group * self.shapes[self._start].size)}
        last = {name: at for at, step in enumerate(self._calls) for name in (step.source, step.shortcut) if name}
        for at, step in enumerate(self._calls):
            shape = self.shapes[step.target]
            found[step.target] = free[shape].pop() if free[shape] else aligned(self.group * shape.size)
            for name in {step.source, step.shortcut} - {"", self._start}:
                if last[name] == at:
                    free[self.shapes[name]].append(found[name])
        return found

    @property
    def scratch(self) -> int:
        """Numbers that the largest step keeps besides."""
        return max(
            _POSITIONS
            * (
                call.block * sum(self.shapes[name].channels for name in (call.source, call.target))
                + 2 * self._library.lanes
            )
            for call in self._calls
        )


class Workspace:
    """The memory of one run, for each member of the crew."""

    def __init__(self, plan: Plan, crew: Crew) -> None:
        self.crew = crew
        self._maps = [plan.maps() for _ in range(crew.members)]
        self._scratch = [aligned(plan.scratch) for _ in range(crew.members)]
        self._steps = [plan.steps(maps) for maps in self._maps]
        self.members = (Member * crew.members)(*map(Member, self._steps, map(address, self._scratch)))


def _shapes(body: Body, start: Shape, panel: int) -> dict[str, Shape]:
    """Return the shape of every value; each is made once, as `body_of` sees to."""
    shapes = {body.start: start}
    for step in body.steps:
        out, into = step.weights.shape[:2]
        source = shapes[step.source]
        if into != source.channels or step.bias.shape != (out,):
            raise EngineError(f"a convolution of {into} channels follows one of {source.channels}")
        if out % panel:
            raise EngineError(f"it has a convolution to {out} channels, which is no multiple of {panel}")
        shape = Shape(out, -(-source.height // step.stride), -(-source.width // step.stride))
        if step.shortcut and shapes[step.shortcut] != shape:
            raise EngineError("it adds maps of different shapes")
        if step.target in shapes:
            raise EngineError("values share a name")
        shapes[step.target] = shape
    if min(map(min, shapes.values())) < 1:
        raise EngineError("its maps are empty")
    return shapes


def _call(step: Convolution, library: Library) -> _Call:
    out, into = step.weights.shape[:2]
    block = 0
    if step.by_tiles and into % library.lanes == 0:
        block = max(_ROWS, min(_TILES, _TILE_CHANNELS // max(out, into)) // _ROWS * _ROWS)
    pack = packing.transformed if block else packing.direct
    weights = pack(step.weights, library.panel)
    return _Call(
        step.source, step.target, step.shortcut, weights, kept(step.bias), step.kernel, step.stride, step.relu, block
    )
