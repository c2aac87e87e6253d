"""What the batcher goes by, and whom it tells: the limits of one model, and the observer of its works."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from layercast.server.inline import NOWHERE, Inline
from layercast.server.work import Work

Reason = Literal["full", "preferred", "timeout", "idle", "drain"]
"""Why a batch closed: no room for more, a preferred size reached, the delay over, no delay wanted, shutting down."""

Rejection = Literal["queue_full", "too_large", "queue_timeout", "draining"]
Phase = Literal["queued", "running"]


@dataclass(frozen=True, slots=True)
class Limits:
    """How one model's works wait and run together.

    `max_batch` is the rows that run together at most, `max_delay` the seconds that the first row waits for others.
    `queue_rows` and `queue_bytes` bound what waits. `preferred` are batch sizes that leave as soon as they are
    reached. `queue_timeout` is the seconds that a request may wait, None for any time; `priorities` the number of
    levels, of which the last is the default. Batches that are `inline` are over so soon that they run on the event
    loop. `together` says that the front end hands over in one pass of the event loop whatever came while the loop was
    busy.
    """

    max_batch: int
    max_delay: float
    queue_rows: int
    queue_bytes: int = 1 << 28
    preferred: tuple[int, ...] = ()
    queue_timeout: float | None = None
    priorities: int = 1
    inline: Inline = NOWHERE
    together: bool = False

    @property
    def gathers(self) -> bool:
        """Whether plain requests, which come one by one, had better wait for each other before they are queued."""
        return bool(self.inline) and not (self.together or self.max_delay or self.preferred)

    @property
    def delay_ns(self) -> int:
        """`max_delay` in nanoseconds."""
        return int(self.max_delay * 1e9)


@dataclass(slots=True)
class Execution:
    """One forward that ran: its rows, why the batch closed, how long it took.

    `tokens` counts the positions of padded inputs that callers sent, `padding` those that joining them added.
    """

    rows: int
    reason: Reason
    compute_ns: int
    tokens: int = 0
    padding: int = 0


def executed(works: Sequence[Work], rows: int, reason: Reason, compute_ns: int) -> Execution:
    """Return what is to be said of a batch of `works`, of `rows` rows together."""
    tokens = longest = 0
    for work in works:
        if work.length:
            tokens += work.rows * work.length
            longest = max(longest, work.length)
    return Execution(rows, reason, compute_ns, tokens, rows * longest - tokens)


class Observer(Protocol):
    """Hears what the batcher does: metrics and statistics."""

    def queued(self, rows: int, size: int) -> None:
        """So many rows, of so many bytes, wait now."""

    def waited(self, seconds: float, requests: int) -> None:
        """A work, of so many requests, left the queue to be run after so long."""

    def executed(self, execution: Execution) -> None:
        """One forward ran and gave what it should."""

    def rejected(self, reason: Rejection) -> None:
        """A request was refused."""

    def expired(self, when: Phase) -> None:
        """A request's deadline passed before its answer."""

    def cancelled(self, when: Phase) -> None:
        """A caller went away."""


def slack_of(left: float) -> float:
    """Return how many seconds before a deadline that is `left` seconds away a cancel is taken for the deadline's own.

    The caller's clock ends the call first: gRPC rounds a timeout up, by 1 % at most, on its way here, and the cancel
    travels.
    """
    return 0.02 + 0.01 * max(0.0, left)


def late_from(deadline: float | None, now: float) -> float:
    """Return from when on a cancel is taken for the `deadline`'s own, on its clock; never without a deadline."""
    return math.inf if deadline is None else deadline - slack_of(deadline - now)
