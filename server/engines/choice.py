"""Which engine runs which batch: a choice for every class of batches, made at the load by what was measured."""

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Final, NamedTuple

from layercast.models.manifest import TensorSpec
from layercast.server.engines.base import Engine, Inputs, Outputs
from layercast.server.settings import EngineName

_SHORT: Final = 16
_MIDDLE: Final = 64
_LONG: Final = 256


class Candidate(NamedTuple):
    """An engine, and how many threads compute a batch on it."""

    engine: EngineName
    threads: int

    def __str__(self) -> str:
        return f"{self.engine} ({self.threads} thread{'s' if self.threads > 1 else ''})"


@dataclass(frozen=True)
class Buckets:
    """Classes of batches, each named by its largest: by `rows`, and by `lengths` where a caller chooses a dimension.

    Both ascend; `lengths` is (0,) for a model without such a dimension. What is larger than all belongs to the last.
    """

    rows: tuple[int, ...]
    lengths: tuple[int, ...] = (0,)

    @classmethod
    def of(cls, inputs: Sequence[TensorSpec], max_batch: int) -> "Buckets":
        """Return the buckets of a model: rows in powers of two up to `max_batch`, three lengths at most."""
        rows = (*(1 << power for power in range((max_batch - 1).bit_length())), max_batch)
        if not any(spec.dynamic_dimensions() for spec in inputs):
            return cls(rows)
        longest = min((spec.max_length for spec in inputs if spec.max_length), default=_LONG)
        return cls(rows, tuple(sorted({min(length, longest) for length in (_SHORT, _MIDDLE, _LONG)})))


@dataclass(frozen=True)
class Choice:
    """A candidate for every bucket: `cells[l][r]` runs batches of length bucket l and row bucket r.

    So many `instances` of the model run batches at the same time. One that runs while no other does, and nothing waits,
    runs as `alone` says, if that is given.
    """

    buckets: Buckets
    cells: tuple[tuple[Candidate, ...], ...]
    instances: int = 1
    alone: "Choice | None" = None

    @classmethod
    def only(cls, candidate: Candidate, buckets: Buckets, instances: int = 1) -> "Choice":
        """Return the choice of one candidate for everything."""
        return cls(buckets, ((candidate,) * len(buckets.rows),) * len(buckets.lengths), instances)

    @property
    def used(self) -> list[Candidate]:
        """The candidates that run anything, but for lone batches, the one with most buckets first."""
        every = [candidate for row in self.cells for candidate in row]
        return sorted(dict.fromkeys(every), key=lambda candidate: -every.count(candidate))

    @property
    def loaded(self) -> list[Candidate]:
        """The candidates that run anything, also those for lone batches."""
        return list(dict.fromkeys([*self.used, *(self.alone.used if self.alone else ())]))

    def __str__(self) -> str:
        """Say in one line what runs what, as an operator reads it: `onnx (1 thread)`, or by rows and length."""
        beside = f"{self.instances} instances: " if self.instances > 1 else ""
        return beside + self._engines() + (f", alone: {self.alone}" if self.alone else "")

    def _engines(self) -> str:
        if len(self.used) == 1:
            return str(self.used[0])
        if len(set(self.cells)) == 1:
            return self._by_rows(self.cells[0])
        parts = []
        for cells, group in groupby(zip(self.cells, self.buckets.lengths, strict=True), key=lambda pair: pair[0]):
            length = [length for _, length in group][-1]
            where = "longer" if length == self.buckets.lengths[-1] else f"up to {length} long"
            parts.append(f"{where}: {self._by_rows(cells)}")
        return "; ".join(parts)

    def _by_rows(self, cells: tuple[Candidate, ...]) -> str:
        parts, first = [], 1
        for candidate, group in groupby(zip(cells, self.buckets.rows, strict=True), key=lambda pair: pair[0]):
            last = [rows for _, rows in group][-1]
            parts.append(f"{candidate} {first}-{last} rows" if last > 1 else f"{candidate} 1 row")
            first = last + 1
        return ", ".join(parts)


class ChosenEngine:
    """Runs each batch on the engine that was chosen for its bucket. Its `name` joins theirs: `onnx+torchscript`."""

    def __init__(self, choice: Choice, engines: Mapping[Candidate, Engine], inputs: Sequence[TensorSpec]) -> None:
        self.name = "+".join(dict.fromkeys(candidate.engine for candidate in choice.used))
        self.device = engines[choice.used[0]].device
        self._table = [[engines[candidate] for candidate in row] for row in choice.cells]
        self._lengths = choice.buckets.lengths
        self._last = len(choice.buckets.rows) - 1
        self._rows_of = inputs[0].name
        self._length_of = length_in(inputs)

    def run(self, inputs: Inputs) -> Outputs:
        """Return every output for the batch."""
        return self.pick(inputs).run(inputs)

    def pick(self, inputs: Inputs) -> Engine:
        """Return the engine that runs a batch of the size of `inputs`."""
        length = bisect_left(self._lengths, self._length_of(inputs)) if self._lengths[1:] else 0
        rows = (len(inputs[self._rows_of]) - 1).bit_length()
        return self._table[min(length, len(self._table) - 1)][min(rows, self._last)]


def length_in(specs: Sequence[TensorSpec]) -> Callable[[Inputs], int]:
    """Return a function that gives a batch's length: the largest of the dimensions that a caller chooses."""
    places = [(spec.name, dimension) for spec in specs for dimension in spec.dynamic_dimensions()]
    return lambda inputs: max((inputs[name].shape[dimension] for name, dimension in places), default=0)
