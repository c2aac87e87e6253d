"""What travels from the service to the batcher and back: rows to run, and each request's own answer."""

import asyncio
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Tap:
    """A layer, and the reducer applied to its output before it leaves the device."""

    layer: str
    reducer: str = "none"


@dataclass(frozen=True, slots=True)
class Rows:
    """One work's own rows of every output and of every layer it tapped."""

    outputs: Mapping[str, Array]
    features: Mapping[Tap, Array]


@dataclass(frozen=True, slots=True)
class Answer(Rows):
    """A work's rows and where the time went; `compute_ns` and `batch_rows` are the whole batch's."""

    queue_ns: int
    compute_ns: int
    batch_rows: int


@dataclass(slots=True, eq=False)
class Work:
    """Rows of one request. `key` says which works may share a forward; times are on the event loop's clock."""

    inputs: Mapping[str, Array]
    rows: int
    key: Hashable
    future: "asyncio.Future[Answer]"
    taps: tuple[Tap, ...] = ()
    predict: bool = True
    deadline: float | None = None
    arrived: float = 0.0
    started: float = 0.0

    def alive(self, now: float) -> bool:
        """Tell whether somebody still waits for the answer."""
        return not self.future.done() and (self.deadline is None or now < self.deadline)
