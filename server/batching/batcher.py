"""Dynamic batching: requests wait together for a moment, run in one forward, and each gets its own rows back.

Three words: gather, compute, answer. Nothing here waits: a change of the queue has it looked at once, at the end of the
event loop's pass, so that all requests that came in one pass are seen together.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence

from layercast.server.batching.admission import Admission
from layercast.server.batching.endings import Endings, too_late
from layercast.server.batching.forwards import Forwards
from layercast.server.batching.gather import Batch, gather, ripe_rows
from layercast.server.batching.instance import Ran, Run
from layercast.server.batching.pace import Pace
from layercast.server.batching.patience import Patience
from layercast.server.batching.policy import Limits, Observer, Phase, Reason, executed, late_from
from layercast.server.batching.queue import Queue
from layercast.server.batching.timers import Timers
from layercast.server.batching.waiting import Waiting, ask, forget
from layercast.server.errors import DeadlineCancelled, Unavailable
from layercast.server.work import Answer, Terms, Work

_NOW = Terms()
_CLOSE_SECONDS = 5.0
_PASSES = 3
"""Of the event loop, in which a request that has come is read, queued, and looked at."""


class Batcher:
    """Admits works, gathers those that may share a forward, runs them and answers each. One a model version.

    `runs` are the model's instances: as many batches run at the same time. `prepare` is called once in each
    thread, with the number of its instance. `alone`: see `Forwards`.
    """

    def __init__(
        self,
        name: str,
        runs: Sequence[Run],
        limits: Limits,
        observer: Observer,
        prepare: Callable[[int], None] | None = None,
        alone: Run | None = None,
    ) -> None:
        self._name = name
        self._limits = limits
        self._observer = observer
        self._queue = Queue(ripe_rows(limits))
        self._endings = Endings(observer)
        self._admission = Admission(name, limits, self._queue, self._endings, self._end)
        self._timers = Timers(name, limits.queue_timeout, self._queue, self._endings, self._end)
        self._pace = Pace(len(runs) if alone else 1)
        tell = self._answer, self._fail, self._look, self._settle
        self._forwards = Forwards(name, runs, prepare, limits, *tell, alone)
        self._loop = asyncio.get_running_loop()
        self._next_look: asyncio.Handle | None = None
        self._delay_over: asyncio.TimerHandle | None = None
        self._patience = Patience(limits.together)
        self._held = self._draining = self._closed = self._hurried = False
        self._passes_left = _PASSES
        self._settled = asyncio.Event()

    @property
    def limits(self) -> Limits:
        """The limits in force."""
        return self._limits

    @property
    def draining(self) -> bool:
        """Whether new requests are refused."""
        return self._draining

    @property
    def instances(self) -> int:
        """How many batches run at the same time at most."""
        return len(self._forwards)

    @property
    def queued_rows(self) -> int:
        """Rows that wait now."""
        return self._queue.held.rows

    def check_room(self, rows: int, peer: str) -> None:
        """Raise Unavailable when `submit` is sure to for so many rows of `peer`: before any work is spent on them."""
        self._admission.check_room(rows, peer)

    def takes_together(self, rows: int, size: int) -> bool:
        """Tell whether requests of so many rows and bytes may be queued as one work: here no row has to run apart."""
        apart = self._draining or self._limits.preferred or len(self._forwards) > 1
        return not apart and self._admission.fits(rows, size)

    def runs_at_once(self, rows: int, requests: int, length: int) -> bool:
        """Tell whether rows of so many requests, so long, if queued now, run on the event loop in `run_now`."""
        waits = self._held or self._queue.held.works or self._limits.max_delay or not self._forwards.free
        return not waits and self._forwards.inline(rows, requests, length)

    async def submit(self, works: Sequence[Work], terms: Terms = _NOW) -> list[Answer]:
        """Queue the works of one request, all or none, and return their answers in order.

        Raises Unavailable at once when there is no room or the model is draining, and when the queue timeout passes
        before the last work is taken to run; DeadlineExceeded as soon as the deadline passes, or when the rows could
        run but are sure to be late. The rows of a caller who is cancelled leave the queue at once; when it is its
        deadline that cancels it, that is counted as such.
        """
        futures = ask(works)
        late, answers = late_from(terms.deadline, self._loop.time()), []
        waiting = self.enqueue(works, terms)
        try:
            for part in range(len(works)):  # an error's traceback would keep a future that is named here
                answers.append(await futures[part])
        except asyncio.CancelledError:
            over = self._loop.time() >= late
            waiting.left(over)
            if over:
                raise DeadlineCancelled from None
            raise
        except Exception as error:
            waiting.failed(error)
            raise
        finally:
            waiting.over()
            forget(futures)
        return answers

    def enqueue(self, works: Sequence[Work], terms: Terms) -> Waiting:
        """Queue the works of one request, all or none, to be answered through their askers: see `submit`."""
        self._admit(works, terms)
        return Waiting(works, terms.course, self._timers.of(works, terms), self._endings, self._withdraw)

    def run_now(self) -> None:
        """Run what waits, a short forward on the event loop: those who would have shared it have waited before."""
        self._look(here=True)

    def hold(self) -> None:
        """Gather nothing until `release`: what arrives waits in the queue. For tests of waiting rows."""
        self._held = True

    def release(self) -> None:
        """Gather again."""
        self._held = False
        self._look_soon()

    def hurry(self) -> None:
        """Let no batch wait for more rows from now on: few will come."""
        self._hurried = True
        self.release()

    async def drain(self, seconds: float | None = None) -> bool:
        """Refuse new requests, not later parts of admitted ones; wait, so long at most, and tell if nothing is left."""
        self._draining = True
        self.hurry()
        self._settle()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._settled.wait(), seconds)
        return self._settled.is_set()

    async def close(self, seconds: float = _CLOSE_SECONDS) -> None:
        """Stop now: every admitted work ends, with its answer or with Unavailable.

        What waits fails at once; a running forward is waited for, `seconds` at most.
        """
        self._draining = self._closed = True
        for work in list(self._queue):
            self._end(work.parts, Unavailable(f"model {self._name!r} was stopped before the rows ran; try again"))
        settled = await self.drain(seconds)
        self._forwards.cancel()
        for work in list(self._forwards.running):
            self._end(work.parts, Unavailable(f"model {self._name!r} was stopped while the rows ran; try again"))
        self._forwards.running.clear()
        self._settle()
        # A thread that is still in a forward now has had its time; it ends by itself or with the process.
        await self._forwards.stop(seconds if settled else 0.0)

    def _admit(self, works: Sequence[Work], terms: Terms) -> None:
        course = terms.course
        if self._closed or (self._draining and not (course and course.admitted)):
            self._endings.rejected("draining", course)
            raise Unavailable(f"model {self._name!r} is shutting down and takes no new requests", retry_after=1.0)
        expires = None
        if terms.deadline is not None:
            left = terms.deadline - self._loop.time()
            if left <= 0:
                self._endings.expired("queued", course)
                raise too_late()
            expires = time.perf_counter_ns() + int(left * 1e9)
        self._admission.admit(works, terms, expires)
        if course:
            course.admitted = True
            self._settled.clear()
        self._patience.came()
        self._changed()

    def _withdraw(self, works: Sequence[Work]) -> Phase:
        """Take a request's unanswered works out of the queue; tell whether any of them had not begun to run."""
        for work in works:
            self._queue.discard(work)
        self._changed()
        return "running" if all(work.started for work in works) else "queued"

    def _end(self, works: Sequence[Work], error: Exception) -> None:
        """End a request with an error: one part that fails ends them all."""
        for work in works:
            self._queue.discard(work)
            if not work.asker.done():
                work.asker.set_exception(error)
        self._changed()

    def _changed(self) -> None:
        """Tell the observer that what waits has changed, and have it looked at."""
        held = self._queue.held
        self._observer.queued(held.rows, held.bytes)
        self._look_soon()

    def _look_soon(self) -> None:
        if self._next_look is None:
            self._next_look = self._loop.call_soon(self._look)

    def _look(self, here: bool = False) -> None:
        """Let free instances run what may run now, `here` if it can be. The first row's arrival starts the clock."""
        self._forget_looks()
        self._patience.passed()
        while self._forwards.free and not self._held:
            if not here and (self._more_may_come() or self._lets_others()):
                self._look_soon()
                return
            self._passes_left = _PASSES
            now = time.perf_counter_ns()
            gathered = gather(self._queue, self._limits, self._pace, now, self._hurried, self._forwards.free)
            for work in gathered.dropped:
                self._end(work.parts, too_late())
            if not gathered.batch:
                self._look_after_delay(now)
                break
            if self._start(gathered.batch, now, here) and self._queue.held.works:
                self._look_soon()  # it ran on this loop: others come first now
                break
        self._settle()

    def _forget_looks(self) -> None:
        for handle in filter(None, (self._next_look, self._delay_over)):
            handle.cancel()
        self._next_look = self._delay_over = None

    def _more_may_come(self) -> bool:
        """Whether the rows that wait would run on the event loop, which may bring others in its next pass."""
        held, oldest = self._queue.held, self._queue.oldest()
        return (
            oldest is not None
            and not (self._hurried or self._limits.max_delay or self._queue.ripe())
            and held.rows < self._limits.max_batch
            and self._patience.here
            and self._forwards.inline(held.rows, held.requests, self._queue.longest)
            and self._patience.lasts(oldest.arrived)
        )

    def _lets_others(self) -> bool:
        """Whether to leave the loop's next pass to models with less to do, before rows hold it up that take longer."""
        held = self._queue.held
        if not (self._passes_left and self._patience.here and held.rows):
            return False
        rows = min(held.rows, self._limits.max_batch)  # and of the requests as many parts
        if not self._forwards.holds_up(rows, held.requests * rows // held.rows, self._queue.longest):
            return False
        self._passes_left -= 1
        return True

    def _start(self, batch: Batch, now: int, here: bool) -> bool:
        """Run a batch that was taken from the queue; tell whether it has ended."""
        held = self._queue.held
        self._observer.queued(held.rows, held.bytes)
        waited, requests = self._observer.waited, 0
        for work in batch.works:
            work.started = now
            waited((now - work.arrived) / 1e9, work.requests)
            requests += work.requests
        self._patience.ran(requests)
        return self._forwards.start(batch, requests, here or self._patience.here, not held.works)

    def _look_after_delay(self, now: int) -> None:
        if oldest := self._queue.oldest():
            seconds = (oldest.arrived + self._limits.delay_ns - now) / 1e9
            self._delay_over = self._loop.call_later(max(0.0, seconds), self._look)

    def _settle(self) -> None:
        if self._draining and not self._queue.held.works and not self._forwards.running:
            self._settled.set()

    def _fail(self, works: Sequence[Work], error: Exception) -> None:
        for work in works:
            self._end(work.parts, error)

    def _answer(self, works: Sequence[Work], ran: Ran, reason: Reason) -> None:
        rows = sum(work.rows for work in works)
        self._pace.ran(works[0].key, rows, ran.compute_ns, time.perf_counter_ns())
        self._observer.executed(executed(works, rows, reason, ran.compute_ns))
        for work, own in zip(works, ran.rows, strict=True):
            if not work.asker.done():
                work.asker.set_result(work.answer(own, ran.compute_ns, rows))
