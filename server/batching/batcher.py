"""Dynamic batching: requests wait together for a moment, run in one forward, and each gets its own rows back.

The loop is three words: gather, compute, answer. Everything runs on the event loop but the forwards, each in the
thread of its instance.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence

from layercast.server.batching.admission import RETRY_SECONDS, Admission
from layercast.server.batching.gather import Batch, gather, ripe_rows
from layercast.server.batching.instance import Instance, Ran, Run
from layercast.server.batching.pace import Pace
from layercast.server.batching.policy import Execution, Limits, Observer, Phase, Reason, slack_of
from layercast.server.batching.queue import Queue
from layercast.server.errors import DeadlineCancelled, DeadlineExceeded, ModelFailed, Unavailable
from layercast.server.work import Answer, Rows, Terms, Work

logger = logging.getLogger(__name__)

_NOW = Terms()
_CLOSE_SECONDS = 5.0


class Batcher:
    """Admits works, gathers those that may share a forward, runs them and answers each. One a model version.

    `runs` are the model's instances: as many batches run at the same time. `prepare` is called once in each thread.
    """

    def __init__(
        self,
        name: str,
        runs: Sequence[Run],
        limits: Limits,
        observer: Observer,
        prepare: Callable[[], None] | None = None,
    ) -> None:
        self._name = name
        self._limits = limits
        self._observer = observer
        self._queue = Queue(ripe_rows(limits))
        self._admission = Admission(name, limits, self._queue, observer, self._end)
        self._pace = Pace()
        self._running: set[Work] = set()
        self._turn = asyncio.Lock()
        self._wake = asyncio.Event()
        self._gate = asyncio.Event()
        self._gate.set()
        self._settled = asyncio.Event()
        self._settled.set()
        self._draining = self._hurried = False
        self._loop = asyncio.get_running_loop()
        self._instances = [Instance(f"layercast-{name}-{at}", run, prepare) for at, run in enumerate(runs)]
        self._tasks = [
            self._loop.create_task(self._serve(instance), name=f"batcher-{name}-{at}")
            for at, instance in enumerate(self._instances)
        ]

    @property
    def limits(self) -> Limits:
        """The limits in force."""
        return self._limits

    @property
    def draining(self) -> bool:
        """Whether new works are refused."""
        return self._draining

    @property
    def instances(self) -> int:
        """How many batches run at the same time at most."""
        return len(self._instances)

    @property
    def queued_rows(self) -> int:
        """Rows that wait now."""
        return self._queue.held.rows

    def future(self) -> "asyncio.Future[Answer]":
        """Return a future for a work of this batcher."""
        return self._loop.create_future()

    async def submit(self, works: Sequence[Work], terms: Terms = _NOW) -> list[Answer]:
        """Queue the works of one request, all or none, and return their answers in order.

        Raises Unavailable at once when there is no room or the model is draining, and when the queue timeout passes
        before the last work is taken to run; DeadlineExceeded as soon as the deadline passes, or when the rows could
        run but are sure to be late. The rows of a caller who is cancelled leave the queue at once; when it is its
        deadline that cancels it, that is counted as such.
        """
        slack = self._admit(works, terms)
        timer = self._queue_timer(works, terms)
        try:
            async with asyncio.timeout_at(terms.deadline) as timeout:
                return [await work.future for work in works]
        except TimeoutError:
            phase = self._withdraw(works)
            if not timeout.expired():  # the model's own
                raise
            self._observer.expired(phase)
            raise _too_late() from None
        except DeadlineExceeded:
            self._observer.expired(self._withdraw(works))
            raise
        except asyncio.CancelledError:
            phase = self._withdraw(works)
            if terms.deadline is not None and self._loop.time() >= terms.deadline - slack:
                self._observer.expired(phase)
                raise DeadlineCancelled from None
            self._observer.cancelled(phase)
            raise
        except Exception:
            self._withdraw(works)
            raise
        finally:
            if timer:
                timer.cancel()

    def hold(self) -> None:
        """Gather nothing until `release`: what arrives waits in the queue. For tests of waiting rows."""
        self._gate.clear()

    def release(self) -> None:
        """Gather again."""
        self._gate.set()
        self._wake.set()

    def hurry(self) -> None:
        """Let no batch wait for more rows from now on: few will come."""
        self._hurried = True
        self.release()

    async def drain(self, seconds: float | None = None) -> bool:
        """Refuse new works and wait until every admitted one is answered, so long at most; tell whether they are."""
        self._draining = True
        self.hurry()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._settled.wait(), seconds)
        return self._settled.is_set()

    async def close(self, seconds: float = _CLOSE_SECONDS) -> None:
        """Stop now: every admitted work ends, with its answer or with Unavailable.

        What waits fails at once; a running forward is waited for, `seconds` at most.
        """
        self._draining = True
        for work in list(self._queue):
            self._end(work.parts, Unavailable(f"model {self._name!r} was stopped before the rows ran; try again"))
        settled = await self.drain(seconds)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for work in list(self._running):
            self._end(work.parts, Unavailable(f"model {self._name!r} was stopped while the rows ran; try again"))
        self._running.clear()
        self._settle()
        # A thread that is still in a forward now has had its time; it ends by itself or with the process.
        patience = seconds if settled else 0.0
        await asyncio.gather(*(instance.stop(patience) for instance in self._instances), return_exceptions=True)
        # What is left of a batcher refers to itself; a model must not wait for a garbage collection to leave memory.
        self._instances.clear()
        self._tasks.clear()

    def _admit(self, works: Sequence[Work], terms: Terms) -> float:
        """Queue the works; return how many seconds before the deadline a cancel is taken for the deadline's own."""
        if self._draining:
            self._observer.rejected("draining")
            raise Unavailable(f"model {self._name!r} is shutting down and takes no new requests", retry_after=1.0)
        expires, slack = None, 0.0
        if terms.deadline is not None:
            left = terms.deadline - self._loop.time()
            if left <= 0:
                self._observer.expired("queued")
                raise _too_late()
            expires, slack = time.perf_counter_ns() + int(left * 1e9), slack_of(left)
        self._admission.admit(works, terms, expires)
        self._settled.clear()
        self._changed()
        return slack

    def _queue_timer(self, works: Sequence[Work], terms: Terms) -> asyncio.TimerHandle | None:
        own, asked = self._limits.queue_timeout, terms.timeout
        seconds = own if asked is None else asked if own is None else min(own, asked)
        return None if seconds is None else self._loop.call_later(seconds, self._time_out, works, seconds)

    def _time_out(self, works: Sequence[Work], seconds: float) -> None:
        if any(work in self._queue for work in works):
            self._observer.rejected("queue_timeout")
            error = f"Request timeout expired: the rows waited {seconds * 1000:g} ms in the queue of {self._name!r}"
            self._end(works, Unavailable(error, retry_after=RETRY_SECONDS))

    def _withdraw(self, works: Sequence[Work]) -> Phase:
        """Take a request's unanswered works out of the queue; tell whether any of them had not begun to run."""
        for work in works:
            self._queue.discard(work)
            # A part that failed beside the one that is reported would else be logged as never looked at.
            if not work.future.cancel() and not work.future.cancelled():
                work.future.exception()
        self._changed()
        return "running" if all(work.started for work in works) else "queued"

    def _end(self, works: Sequence[Work], error: Exception) -> None:
        """End a request with an error: one part that fails ends them all."""
        for work in works:
            self._queue.discard(work)
            if not work.future.done():
                work.future.set_exception(error)
        self._changed()

    def _changed(self) -> None:
        """Tell the observer and the gatherer that what waits has changed."""
        self._observer.queued(self._queue.held.rows, self._queue.held.bytes)
        self._wake.set()

    async def _serve(self, instance: Instance) -> None:
        """Run one instance for good: it gathers when it is free, one instance at a time."""
        while True:
            async with self._turn:
                batch = await self._gather()
            try:
                await self._compute(instance, batch.works, batch.reason)
            except Exception as error:
                logger.exception("the batcher of model %s failed", self._name)
                for work in batch.works:
                    self._end(work.parts, error)
            self._running.difference_update(batch.works)
            self._settle()

    async def _gather(self) -> Batch:
        """Return the next batch, when there is one. The first row's arrival starts the clock."""
        while True:
            await self._gate.wait()
            now = time.perf_counter_ns()
            gathered = gather(self._queue, self._limits, self._pace, now, self._hurried)
            for work in gathered.dropped:
                self._end(work.parts, _too_late())
            if batch := gathered.batch:
                self._running.update(batch.works)
                self._changed()
                for work in batch.works:
                    work.started = now
                    self._observer.waited((now - work.arrived) / 1e9)
                return batch
            self._settle()
            oldest = self._queue.oldest()
            await self._sleep((oldest.arrived + self._limits.delay_ns - now) / 1e9 if oldest else None)

    def _settle(self) -> None:
        if not self._queue and not self._running:
            self._settled.set()

    async def _sleep(self, seconds: float | None) -> None:
        """Return when something changed or `seconds` passed."""
        self._wake.clear()
        timer = None if seconds is None else self._loop.call_later(max(0.0, seconds), self._wake.set)
        try:
            await self._wake.wait()
        finally:
            if timer:
                timer.cancel()

    async def _compute(self, instance: Instance, works: Sequence[Work], reason: Reason) -> None:
        """Run the batch and answer its works. When it raises, run each work alone, so that only the culprit fails.

        A model that breaks its contract does so for every row: the whole batch fails, and nothing is run again.
        """
        try:
            ran = await instance.run(works)
            if len(ran.rows) != len(works):
                raise ModelFailed(f"this is a bug: {len(works)} works ran and {len(ran.rows)} results came back")
        except Exception as error:
            if len(works) > 1 and not isinstance(error, ModelFailed):
                for work in works:
                    if work.alive(time.perf_counter_ns()):
                        await self._compute(instance, [work], reason)
                return
            for work in works:
                self._end(work.parts, error)
            return
        self._answer(works, ran, reason)

    def _answer(self, works: Sequence[Work], ran: Ran, reason: Reason) -> None:
        rows = sum(work.rows for work in works)
        self._pace.ran(works[0].key, rows, ran.compute_ns, time.perf_counter_ns())
        tokens = sum(work.rows * work.length for work in works)
        padding = rows * max(work.length for work in works) - tokens
        self._observer.executed(Execution(rows, reason, ran.compute_ns, tokens, padding))
        for work, own in zip(works, ran.rows, strict=True):
            if not work.future.done():
                work.future.set_result(_answer(work, own, ran.compute_ns, rows))


def _answer(work: Work, own: Rows, compute_ns: int, batch_rows: int) -> Answer:
    return Answer(own.outputs, own.features, work.started - work.arrived, compute_ns, batch_rows)


def _too_late() -> DeadlineExceeded:
    return DeadlineExceeded("the deadline passes before the answer can be there; allow more time or send fewer rows")
