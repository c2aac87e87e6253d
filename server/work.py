"""What travels from the service to the batcher and back: rows to run, on what terms, and each request's own answer."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from numpy.typing import NDArray

from layercast.models.edits import Planned

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Tap:
    """A layer, and the reducer applied to its output before it leaves the device."""

    layer: str
    reducer: str = "none"


# What is made for every request is no dataclass: compiled, these are still made by Python.
class Rows:
    """One work's own rows of every output and of every layer it tapped."""

    __slots__ = ("features", "outputs")

    def __init__(self, outputs: Mapping[str, Array], features: Mapping[Tap, Array]) -> None:
        self.outputs = outputs
        self.features = features


class Answer(Rows):
    """A work's rows and where the time went; `compute_ns` and `batch_rows` are the whole batch's."""

    __slots__ = ("batch_rows", "compute_ns", "queue_ns")

    def __init__(
        self,
        outputs: Mapping[str, Array],
        features: Mapping[Tap, Array],
        queue_ns: int,
        compute_ns: int,
        batch_rows: int,
    ) -> None:
        super().__init__(outputs, features)
        self.queue_ns = queue_ns
        self.compute_ns = compute_ns
        self.batch_rows = batch_rows


class Course:
    """What the parts of one request have in common that are queued one after the other, not all at once.

    `admitted` is set once the first is queued: the others are part of what was admitted. `counted` is set once the
    request's end is counted, or is not to be: the parts that end with it are not counted again. Or else, what the
    `requests` have in common that are queued as one work, and end together.
    """

    __slots__ = ("admitted", "counted", "requests")

    def __init__(self, admitted: bool = False, counted: bool = False, requests: int = 1) -> None:
        self.admitted = admitted
        self.counted = counted
        self.requests = requests


class Terms:
    """On what terms a request waits for its rows to run.

    `deadline` is the caller's, in seconds on the event loop's clock. `timeout` is how many seconds the request lets
    itself wait in the queue; it may shorten the model's own limit, not extend it. `priority` is 1 for the highest
    level; 0, or a level that the model does not have, is the model's default. `peer` is who asks: peers share a model
    evenly. `course` is what the parts share of a request that is queued part after part. `waited_ns` is how long the
    rows have waited already.
    """

    __slots__ = ("course", "deadline", "peer", "priority", "timeout", "waited_ns")

    def __init__(
        self,
        deadline: float | None = None,
        timeout: float | None = None,
        priority: int = 0,
        peer: str = "",
        course: Course | None = None,
        waited_ns: int = 0,
    ) -> None:
        self.deadline = deadline
        self.timeout = timeout
        self.priority = priority
        self.peer = peer
        self.course = course
        self.waited_ns = waited_ns


class Asker(Protocol):
    """Who waits for a work's answer: told its end once, on the event loop. An asyncio future is one."""

    def done(self) -> bool:
        """Tell whether it waits no more."""

    def set_result(self, result: Answer, /) -> None:
        """Take the answer."""

    def set_exception(self, exception: Exception, /) -> None:
        """Take the reason why there is none."""


class _Nobody:
    def done(self) -> bool:
        return True

    def set_result(self, result: Answer, /) -> None: ...

    def set_exception(self, exception: Exception, /) -> None: ...


NOBODY: Final[Asker] = _Nobody()
"""Asks for works whose answer nobody waits for, or not any more."""


class Work:
    """Rows of one request. `key` says which works may share a forward.

    `bytes` is the size of the inputs, `length` the size of the dimension that is padded when lengths differ (0 where
    there is none). `edits` change layers for these rows alone. `asker` is set by who queues it. All else is the
    batcher's: `parts` are the works of the same request, itself included; times are nanoseconds on
    `time.perf_counter_ns`'s clock.
    """

    __slots__ = (
        "arrived", "asker", "bytes", "course", "edits", "expires", "inputs", "key", "length", "parts", "peer",
        "predict", "priority", "rows", "started", "taps",
    )  # fmt: skip

    def __init__(
        self,
        inputs: Mapping[str, Array],
        rows: int,
        key: Hashable,
        bytes: int = 0,
        length: int = 0,
        taps: tuple[Tap, ...] = (),
        predict: bool = True,
        edits: tuple[Planned, ...] = (),
        asker: Asker = NOBODY,
    ) -> None:
        self.inputs = inputs
        self.rows = rows
        self.key = key
        self.bytes = bytes
        self.length = length
        self.taps = taps
        self.predict = predict
        self.edits = edits
        self.asker = asker
        self.parts: Sequence[Work] = ()
        self.peer = ""
        self.course: Course | None = None
        self.priority = 1
        self.expires: int | None = None
        self.arrived = self.started = 0

    @property
    def requests(self) -> int:
        """How many requests the rows belong to."""
        return self.course.requests if self.course else 1

    def alive(self, now: int) -> bool:
        """Tell whether somebody still waits for the answer."""
        return not self.asker.done() and (self.expires is None or now < self.expires)

    def answer(self, own: Rows, compute_ns: int, batch_rows: int) -> Answer:
        """Return the answer: its `own` rows of a batch of so many."""
        return Answer(own.outputs, own.features, self.started - self.arrived, compute_ns, batch_rows)
