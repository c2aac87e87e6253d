"""The lane of explanations: one at a time, in a thread of its own, beside the batches."""

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from layercast.models.explain import Explanation
from layercast.models.explain.subject import Progress
from layercast.server.batching.instance import deliver, harmless
from layercast.server.batching.policy import slack_of
from layercast.server.errors import DeadlineCancelled, DeadlineExceeded, Unavailable

MAX_WAITING: Final = 16
"""Explanations that may wait for the one that runs; more are refused."""

Job = Callable[[Progress], Explanation]


@dataclass(frozen=True)
class Explained:
    """An explanation, how long it waited for the lane and how long it took."""

    explanation: Explanation
    queue_ns: int
    compute_ns: int


class _Abandoned(Exception):
    """Nobody waits for the explanation any more."""


class ExplainLane:
    """Runs explanations in the order in which they come. Made on the event loop.

    They take no place among the batches, which go on beside them. One that is cancelled, also by its deadline, leaves
    the queue at once, or if it runs, stops after its chunk.
    """

    def __init__(self) -> None:
        self._free = asyncio.Semaphore(1)
        self._waiting = 0

    async def run(self, job: Job, deadline: float | None = None) -> Explained:
        """Run `job` and return what it gives.

        Raises Unavailable when too many wait, DeadlineExceeded when the `deadline`, on the event loop's clock, passes,
        and what the job raises. A caller whom the deadline cancels an instant before is told apart from others.
        """
        clock = asyncio.get_running_loop().time
        slack = 0.0 if deadline is None else slack_of(deadline - clock())
        try:
            async with asyncio.timeout_at(deadline) as timeout:
                return await self._run(job)
        except TimeoutError:
            if not timeout.expired():  # the job's own
                raise
            raise DeadlineExceeded("the deadline passed before the explanation; allow more time or ask less") from None
        except asyncio.CancelledError:
            if deadline is not None and clock() >= deadline - slack:
                raise DeadlineCancelled from None
            raise

    async def _run(self, job: Job) -> Explained:
        if self._waiting >= MAX_WAITING:
            raise Unavailable(f"{self._waiting} explanations wait already, and no more may; try again later")
        arrived = time.perf_counter_ns()
        self._waiting += 1
        try:
            await self._free.acquire()
        finally:
            self._waiting -= 1
        started = time.perf_counter_ns()
        explanation = await self._in_thread(job)
        return Explained(explanation, started - arrived, time.perf_counter_ns() - started)

    async def _in_thread(self, job: Job) -> Explanation:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Explanation] = loop.create_future()
        gone = threading.Event()

        def work() -> None:
            explanation, error = None, None
            try:
                explanation = job(_watch(gone))
            except BaseException as raised:
                error = harmless(raised)
            try:
                loop.call_soon_threadsafe(self._ended, future, explanation, error)
            except RuntimeError:  # the loop is closed: nobody is there to be told
                return

        # A daemon, so that a forward that never ends can't keep the process alive.
        thread = threading.Thread(target=work, name="explain", daemon=True)
        try:
            thread.start()
        except RuntimeError:
            self._free.release()
            raise
        try:
            return await future
        finally:
            gone.set()

    def _ended(
        self, future: "asyncio.Future[Explanation]", explanation: Explanation | None, error: Exception | None
    ) -> None:
        self._free.release()
        deliver(future, explanation, error)


def _watch(gone: threading.Event) -> Progress:
    def progress(done: int, total: int) -> None:
        if gone.is_set():
            raise _Abandoned

    return progress
