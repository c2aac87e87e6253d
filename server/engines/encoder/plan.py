"""Where the values of a body lie, and with which weights each of its steps is called."""

import ctypes
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from layercast.server.engines.base import EngineError
from layercast.server.engines.encoder.body import Body
from layercast.server.engines.encoder.library import ACTIVATIONS, QUERIES, Batch, Kind, Library, Step, Steps
from layercast.server.engines.encoder.steps import AnyStep, Attention, Norm
from layercast.server.engines.native.kernel import Crew
from layercast.server.engines.native.memory import LINE, Floats, address, aligned, kept
from layercast.server.work import Array

_GROUP_TOKENS: Final = 256
"""Tokens that go through all steps together, so that their values stay in the cache from step to step."""
_MOST: Final = 1 << 30
"""What the library counts with has 32 bits, and it adds a few to rows and tokens."""
_MOST_KEPT: Final = 64 << 20
"""Bytes that are kept from one batch to the next."""

Value = str | tuple[str]
"""A value of the program by its name; with the name of what attention gives in a tuple, what it is computed from."""


class _Call(NamedTuple):
    """A call of the library: the values, numbers a token of the first two, and the rest as the library reads it."""

    kind: Kind
    source: Value
    target: Value
    into: int
    out: int
    addend: str = ""
    weights: Floats | None = None
    bias: Floats | None = None
    activation: int = 0
    heads: int = 0
    mask: str = ""
    factor: str = ""
    number: float = 0.0
    hidden: float = 0.0


class Plan:
    """The steps of a body for tokens of one width; what it keeps is never changed."""

    def __init__(self, library: Library, body: Body, width: int) -> None:
        """EngineError where the steps do not fit together."""
        self._library = library
        self._start = body.start
        self._masks, self._factors = body.masks, body.factors
        self._calls = [call for step in body.steps for call in _calls(step, library.kernel.panel)]
        widths = _widths(self._calls, body.start, width)
        self.width, self.end_width = width, widths[body.end]
        self._widest = max(widths.values())
        self._heads = max(call.out // call.heads for call in self._calls if call.heads)
        places, offsets = _places(self._calls, body, widths)
        self._numbers = offsets[-1]
        self._arrays = self._steps(places), (ctypes.c_ssize_t * len(offsets))(*offsets)
        self._plan = Steps(self._arrays[0], len(self._calls), self._arrays[1], self._numbers)

    def run(self, values: Mapping[str, Array], crew: Crew, memory: "Memory") -> Floats:
        """Return the body's end, [rows, length, width], of its start and what else it reads, by name.

        EngineError for values that are not as the plan was made for: the library would read what is none.
        """
        source = values[self._start]
        rows, length = (*source.shape, 0, 0)[:2]
        source = _check(self._start, source, np.float32, (rows, length, self.width))
        sides = [
            *(_check(name, values[name], np.int32, (rows, length)) for name in self._masks),
            *(_check(name, values[name], np.float32, (rows, 1, 1)) for name in self._factors),
        ]
        if not rows * length:
            return np.empty((rows, length, self.end_width), np.float32)
        group = crew.group(max(1, min(_GROUP_TOKENS // length, rows)), rows)
        if max(rows * length, group * length * self._widest) > _MOST:
            raise EngineError(f"{rows:,} rows of {length:,} tokens are more than it computes at once")
        results = np.empty((rows, length, self.end_width), np.float32)
        each = self._each(group, length)
        batch = Batch(
            source.ctypes.data, results.ctypes.data, self.width, self.end_width,
            (ctypes.c_void_p * len(sides))(*(side.ctypes.data for side in sides)),
            rows, length, group, memory.of(each * crew.members), each,
        )  # fmt: skip
        self._library.run(self._plan, batch, crew.pointer)
        memory.shrink()
        return results

    def _each(self, group: int, length: int) -> int:
        """Return the numbers of memory that a member of the crew has, in whole lines of the cache."""
        padded = _rounded(length, self._library.kernel.lanes)
        return _rounded(self._numbers * group * length + padded * (self._heads + 1 + QUERIES) + QUERIES, LINE)

    def _steps(self, places: Mapping[Value, int]) -> "ctypes.Array[Step]":
        """Return the calls as the library reads them."""

        def side(names: Sequence[str], name: str, first: int = 0) -> int:
            return first + names.index(name) if name else -1

        every = [
            Step(
                call.kind, call.activation, places[call.source], places[call.target],
                places[call.addend] if call.addend else -1, call.into, call.out, call.heads,
                side(self._masks, call.mask), side(self._factors, call.factor, len(self._masks)),
                call.number, call.hidden,
                *(None if array is None else address(array) for array in (call.weights, call.bias)),
            )
            for call in self._calls
        ]  # fmt: skip
        return (Step * len(every))(*every)


class Memory:
    """What one run at a time keeps its values in; it grows with the batches."""

    def __init__(self) -> None:
        self._numbers = aligned(0)
        self._begin = 0

    def of(self, size: int) -> int:
        """Return where `size` numbers begin."""
        if self._numbers.size < size:
            self._numbers = aligned(0)  # never both
            self._numbers = aligned(size)
            self._begin = address(self._numbers)
        return self._begin

    def shrink(self) -> None:
        """Give back what only rare batches need."""
        if self._numbers.nbytes > _MOST_KEPT:
            self._numbers = aligned(0)


def _calls(step: AnyStep, panel: int) -> list[_Call]:
    """Return what computes `step`: attention is a product, and another call for its results."""
    if isinstance(step, Norm):
        arrays = kept(step.weights), kept(step.bias)
        return [
            _Call(Kind.NORM, step.source, step.target, step.width, step.width, "", *arrays, number=step.epsilon)
        ]  # fmt: skip
    into, out = step.weights.shape
    weights = _in_panels(step.weights, panel)
    bias = aligned(out) if step.bias is None else kept(step.bias)
    if not isinstance(step, Attention):
        activation = ACTIVATIONS[step.activation]
        return [_Call(Kind.LINEAR, step.source, step.target, into, out, step.addend, weights, bias, activation)]
    between: Value = (step.target,)
    return [
        _Call(Kind.LINEAR, step.source, between, into, out, "", weights, bias),
        _Call(
            Kind.ATTENTION, between, step.target, out, step.width, heads=step.heads, mask=step.mask,
            factor=step.factor, number=step.scale, hidden=step.hidden,
        ),
    ]  # fmt: skip


def _in_panels(weights: Floats, panel: int) -> Floats:
    """Return weights [in, out] as panels [in, out of the panel], one after the other; the last may be narrower."""
    parts = [weights[:, at : at + panel].ravel() for at in range(0, weights.shape[1], panel)]
    return kept(np.concatenate(parts))


def _widths(calls: Sequence[_Call], start: str, width: int) -> dict[Value, int]:
    """Return the numbers a token of every value; each is made once, as `body_of` sees to."""
    widths: dict[Value, int] = {start: width}
    for call in calls:
        if widths[call.source] != call.into:
            raise EngineError(f"a step for {call.into} numbers a token follows one that gives {widths[call.source]}")
        if call.addend and widths[call.addend] != call.out:
            raise EngineError("it adds values of different shapes")
        if call.target in widths:
            raise EngineError("values share a name")
        widths[call.target] = call.out
    return widths


def _places(calls: Sequence[_Call], body: Body, widths: Mapping[Value, int]) -> tuple[dict[Value, int], list[int]]:
    """Return the place of every value, and the numbers a token before each place, and before what comes after all.

    Place 0 is the caller's input, 1 the output. Values of one width share a place where their times do not meet.
    """
    places: dict[Value, int] = {body.start: 0, body.end: 1}
    offsets = [0, 0, 0]
    free: dict[int, list[int]] = defaultdict(list)
    last = {name: at for at, call in enumerate(calls) for name in (call.source, call.addend) if name}
    for at, call in enumerate(calls):
        if call.target not in places:
            width = widths[call.target]
            if free[width]:
                places[call.target] = free[width].pop()
            else:
                places[call.target] = len(offsets) - 1
                offsets.append(offsets[-1] + width)
        for name in {call.source, call.addend} - {"", body.start}:
            if last[name] == at:
                free[widths[name]].append(places[name])
    return places, offsets


def _check(name: str, values: Array, dtype: type[np.generic], shape: tuple[int, ...]) -> NDArray[Any]:
    if values.dtype != dtype or values.shape != shape:
        want = np.dtype(dtype)
        raise EngineError(f"{name!r}: want {want} {list(shape)}, got {values.dtype} {list(values.shape)}")
    return np.ascontiguousarray(values)


def _rounded(size: int, to: int) -> int:
    return -(-size // to) * to
