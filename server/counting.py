"""Counters, gauges and histograms for what is counted at every request: plain numbers, read when a scrape asks.

Those of prometheus_client take a lock at each count, since any thread may count with them; a dozen of them were a
fifth of what a request cost. These are counted with on the event loop alone, and may be read from any thread.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Generic, Literal, Protocol, TypeVar

from prometheus_client import CollectorRegistry, Metric

Sample = tuple[str, Mapping[str, str], float]
"""One line of a scrape: what follows the family's name, labels beside the series' own, and the value."""


class Series(Protocol):
    """The numbers under one set of label values."""

    def samples(self) -> Iterable[Sample]:
        """Yield what a scrape sees."""


S = TypeVar("S", bound=Series)


class Count:
    """A number that only grows."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0

    def inc(self, by: float = 1) -> None:
        """Count `by` more, 0 or greater."""
        self.value += by

    def samples(self) -> Iterable[Sample]:
        """Yield what a scrape sees."""
        yield "_total", {}, self.value


class Level:
    """A number that goes up and down."""

    __slots__ = ("_read", "value")

    def __init__(self) -> None:
        self.value = 0.0
        self._read: Callable[[], float] | None = None

    def set(self, value: float) -> None:
        """Be `value` from now on."""
        self.value = value

    def add(self, more: float) -> None:
        """Rise by `more`, or fall when that is below 0."""
        self.value += more

    def set_function(self, read: Callable[[], float]) -> None:
        """Be what `read` returns whenever a scrape asks."""
        self._read = read

    def samples(self) -> Iterable[Sample]:
        """Yield what a scrape sees."""
        yield "", {}, self._read() if self._read else self.value


class Spread:
    """How many values fell below each of `bounds`, which ascend, and their sum."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count `value`, 0 or greater, so many times."""
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def samples(self) -> Iterable[Sample]:
        """Yield what a scrape sees."""
        below = list(accumulate(self._counts))
        for bound, count in zip([*map(float, self._bounds), "+Inf"], below, strict=True):
            yield "_bucket", {"le": str(bound)}, count
        yield "_count", {}, below[-1]
        yield "_sum", {}, self._sum


class Family(Generic[S]):
    """The series of one metric by the values of its `labels`, on `registry`. `make` gives the numbers of a new one."""

    def __init__(
        self,
        name: str,
        text: str,
        kind: Literal["counter", "gauge", "histogram"],
        labels: Sequence[str],
        make: Callable[[], S],
        registry: CollectorRegistry,
    ) -> None:
        self._name = name.removesuffix("_total")
        self._text = text
        self._kind = kind
        self._labels = tuple(labels)
        self._make = make
        self._series: dict[tuple[str, ...], S] = {}
        registry.register(self)

    def labels(self, *values: object) -> S:
        """Return the series of these label values, which begins at zero when it is new."""
        key = tuple(map(str, values))
        found = self._series.get(key)
        if found is None:
            if len(key) != len(self._labels):
                raise ValueError(f"{self._name} has the labels {', '.join(self._labels)}, got {len(key)} values")
            found = self._series[key] = self._make()
        return found

    def remove_by_labels(self, labels: Mapping[str, str]) -> None:
        """Remove every series with these label values; who still counts with one is not heard."""
        places = [(self._labels.index(name), value) for name, value in labels.items()]
        gone = [key for key in self._series if all(key[place] == value for place, value in places)]
        for key in gone:
            del self._series[key]

    def describe(self) -> Iterator[Metric]:
        """Yield the metric without its series."""
        yield Metric(self._name, self._text, self._kind)

    def collect(self) -> Iterator[Metric]:
        """Yield the metric as a scrape sees it now."""
        metric = Metric(self._name, self._text, self._kind)
        for key, series in list(self._series.items()):
            own = dict(zip(self._labels, key, strict=True))
            for suffix, labels, value in series.samples():
                metric.add_sample(self._name + suffix, {**own, **labels}, value)
        yield metric
