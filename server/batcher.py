"""Dynamic batching: requests wait together for a moment, run in one forward, and each gets its own rows back.

The loop is three words: gather, compute, answer. Everything runs on the event loop but the forward, which runs in the
model's own thread.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, Protocol

from layercast.server.errors import DeadlineExceeded, InvalidArgument, Unavailable
from layercast.server.queue import Queue
from layercast.server.work import Answer, Rows, Work

Reason = Literal["full", "timeout", "idle", "drain"]
Run = Callable[[Sequence[Work]], Sequence[Rows]]
"""Runs works that may share a forward, in the model's thread; returns the rows of each, in order."""

_RETRY_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Limits:
    """Rows that run together at most, seconds that the first row waits for others, rows that may wait."""

    max_batch: int
    max_delay: float
    queue_rows: int


class Observer(Protocol):
    """Hears what the batcher does: metrics and statistics."""

    def queued(self, rows: int) -> None:
        """So many rows wait now."""

    def waited(self, seconds: float) -> None:
        """A work left the queue to be run, after so long."""

    def executed(self, rows: int, reason: Reason, compute_ns: int) -> None:
        """One forward ran."""

    def rejected(self, reason: Literal["queue_full", "too_large", "deadline", "draining"]) -> None:
        """A request was refused, or its deadline passed before it ran."""

    def cancelled(self, when: Literal["queued", "running"]) -> None:
        """A caller went away."""


class Batcher:
    """Admits works, gathers those that may share a forward, runs them and answers each. One a model version."""

    def __init__(self, name: str, run: Run, limits: Limits, observer: Observer) -> None:
        self._name = name
        self._run = run
        self._limits = limits
        self._observer = observer
        self._queue = Queue()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"layercast-{name}")
        self._wake = asyncio.Event()
        self._gate = asyncio.Event()
        self._gate.set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = False
        self._loop = asyncio.get_running_loop()
        self._task = self._loop.create_task(self._serve(), name=f"batcher-{name}")

    @property
    def limits(self) -> Limits:
        """The limits in force."""
        return self._limits

    @property
    def queued_rows(self) -> int:
        """Rows that wait now."""
        return self._queue.rows

    def future(self) -> "asyncio.Future[Answer]":
        """Return a future for a work of this batcher."""
        return self._loop.create_future()

    async def submit(self, works: Sequence[Work], deadline: float | None = None) -> list[Answer]:
        """Queue the works of one request, all or none, and return their answers in order.

        `deadline` is on the event loop's clock. Raises Unavailable at once when the queue is full or the model is
        draining, DeadlineExceeded as soon as the deadline passes. A cancelled caller's rows leave the queue at once.
        """
        self._admit(works)
        try:
            async with asyncio.timeout_at(deadline) as timeout:
                return [await work.future for work in works]
        except TimeoutError:
            self._withdraw(works)
            if not timeout.expired():  # the model's own
                raise
            self._observer.rejected("deadline")
            raise DeadlineExceeded(
                "the deadline passed before the answer; allow more time or send fewer rows"
            ) from None
        except asyncio.CancelledError:
            queued = self._withdraw(works)
            # A transport may cancel at the deadline an instant before the timeout here fires.
            if deadline is not None and self._loop.time() >= deadline:
                self._observer.rejected("deadline")
            else:
                self._observer.cancelled("queued" if queued else "running")
            raise
        except Exception:
            self._withdraw(works)
            raise

    def hold(self) -> None:
        """Gather nothing until `release`: what arrives waits in the queue. For tests of waiting rows."""
        self._gate.clear()

    def release(self) -> None:
        """Gather again."""
        self._gate.set()
        self._wake.set()

    async def drain(self) -> None:
        """Refuse new works, and return once every admitted one is answered."""
        self._draining = True
        self.release()
        await self._idle.wait()

    async def close(self) -> None:
        """Stop now: waiting works fail with Unavailable, a running forward is waited for."""
        self._draining = True
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        while work := self._queue.oldest():
            for taken in self._queue.take(work.key, self._limits.queue_rows):
                _fail(taken, Unavailable(f"model {self._name!r} was stopped before the rows ran; try again"))
        await asyncio.to_thread(self._thread.shutdown)

    def _admit(self, works: Sequence[Work]) -> None:
        rows = sum(work.rows for work in works)
        limit = self._limits.queue_rows
        if self._draining:
            self._observer.rejected("draining")
            raise Unavailable(f"model {self._name!r} is shutting down and takes no new requests", retry_after=1.0)
        if rows > limit:
            self._observer.rejected("too_large")
            raise InvalidArgument(
                f"the request has {rows} rows, the queue holds {limit}; send them in several requests"
            )
        if self._queue.rows + rows > limit:
            self._observer.rejected("queue_full")
            raise Unavailable(
                f"the queue of model {self._name!r} is full: {self._queue.rows} of {limit} rows wait, "
                f"{rows} more came; try again shortly",
                retry_after=_RETRY_SECONDS,
            )
        now = self._loop.time()
        for work in works:
            work.arrived = now
            self._queue.push(work)
        self._idle.clear()
        self._observer.queued(self._queue.rows)
        self._wake.set()

    def _withdraw(self, works: Sequence[Work]) -> bool:
        """Take a request's unanswered works out of the queue; tell whether any still waited there."""
        queued = [work for work in works if self._queue.holds(work)]
        for work in works:
            # A part that failed beside the one that is reported would else be logged as never looked at.
            if not work.future.cancel() and not work.future.cancelled():
                work.future.exception()
        for work in queued:
            self._queue.discard(work)
        self._observer.queued(self._queue.rows)
        self._wake.set()
        return bool(queued)

    async def _serve(self) -> None:
        while True:
            works, reason = await self._gather()
            outcomes, compute_ns = await self._compute(works, reason)
            self._answer(works, outcomes, compute_ns)

    async def _gather(self) -> tuple[list[Work], Reason]:
        """Return works that may share a forward, and why the batch closed. The first row's arrival starts the clock."""
        while True:
            await self._gate.wait()
            wait: float | None = None
            first = self._queue.oldest()
            if first is None:
                self._idle.set()
            else:
                wait = first.arrived + self._limits.max_delay - self._loop.time()
                reason = self._closes(first, wait)
                if reason and (works := self._take(first)):
                    return works, reason
                if reason:
                    continue
            await self._sleep(wait)

    def _closes(self, first: Work, wait: float) -> Reason | None:
        if self._queue.waiting(first.key, self._limits.max_batch) >= self._limits.max_batch:
            return "full"
        if self._draining:
            return "drain"
        if wait <= 0:
            return "timeout" if self._limits.max_delay else "idle"
        return None

    def _take(self, first: Work) -> list[Work]:
        """Remove the next batch from the queue, without those that nobody waits for."""
        now = self._loop.time()
        works = [work for work in self._queue.take(first.key, self._limits.max_batch) if work.alive(now)]
        self._observer.queued(self._queue.rows)
        for work in works:
            self._observer.waited(now - work.arrived)
            work.started = now
        return works

    async def _sleep(self, seconds: float | None) -> None:
        """Return when something arrived or `seconds` passed."""
        self._wake.clear()
        timer = None if seconds is None else self._loop.call_later(seconds, self._wake.set)
        try:
            await self._wake.wait()
        finally:
            if timer:
                timer.cancel()

    async def _compute(self, works: list[Work], reason: Reason) -> tuple[Sequence[Rows | Exception], int]:
        """Run the batch. When it fails and holds several works, run each alone, so that only the culprit fails."""
        try:
            outcomes, compute_ns = await self._loop.run_in_executor(self._thread, self._timed, works)
        except Exception as error:
            if len(works) == 1:
                return [error], 0
            alone = [await self._compute([work], reason) for work in works]
            return [outcome for outcomes, _ in alone for outcome in outcomes], max(ns for _, ns in alone)
        self._observer.executed(sum(work.rows for work in works), reason, compute_ns)
        return outcomes, compute_ns

    def _timed(self, works: list[Work]) -> tuple[Sequence[Rows], int]:
        start = time.perf_counter_ns()
        try:
            rows = self._run(works)
        except (StopIteration, asyncio.CancelledError) as error:
            # A future takes neither for a result: the first would never arrive, the second would end the loop.
            raise RuntimeError(f"the model raised {type(error).__name__}") from error
        compute_ns = time.perf_counter_ns() - start
        if len(rows) != len(works):
            raise ValueError(f"this is a bug: {len(works)} works ran and {len(rows)} results came back")
        return rows, compute_ns

    def _answer(self, works: list[Work], outcomes: Sequence[Rows | Exception], compute_ns: int) -> None:
        batch_rows = sum(work.rows for work in works)
        for work, outcome in zip(works, outcomes, strict=True):
            if isinstance(outcome, Exception):
                _fail(work, outcome)
            elif not work.future.done():
                queue_ns = int((work.started - work.arrived) * 1e9)
                work.future.set_result(Answer(outcome.outputs, outcome.features, queue_ns, compute_ns, batch_rows))


def _fail(work: Work, error: Exception) -> None:
    if not work.future.done():
        work.future.set_exception(error)
