"""One copy of a model in a thread of its own."""

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

from layercast.server.work import Rows, Work

T = TypeVar("T")

Run = Callable[[Sequence[Work]], Sequence[Rows]]
"""Runs works that may share a forward, in the instance's thread; returns the rows of each, in order."""


class Ran(NamedTuple):
    """The rows of each work, and how long the forward took."""

    rows: Sequence[Rows]
    compute_ns: int


Done = Callable[[Ran | None, Exception | None], None]
"""Told, on the event loop, how a forward ended: what it gave, or else what it raised."""


class Instance:
    """Runs batches one at a time. `prepare` is called in the thread before anything else.

    The thread is a daemon, so that a forward that never ends can't keep the process alive.
    """

    def __init__(self, name: str, run: Run, prepare: Callable[[], None] | None = None) -> None:
        self._run = run
        self._prepare = prepare
        self._loop = asyncio.get_running_loop()
        self._jobs: queue.SimpleQueue[tuple[Sequence[Work], Done] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._thread.start()

    def start(self, works: Sequence[Work], done: Done) -> None:
        """Run `works` in one forward in the thread, and tell `done` how it ended."""
        self._jobs.put((works, done))

    async def run(self, works: Sequence[Work]) -> Ran:
        """Run `works` in one forward in the thread. Raises what the model raises."""
        future: asyncio.Future[Ran] = self._loop.create_future()
        self.start(works, partial(deliver, future))
        return await future

    def run_here(self, works: Sequence[Work]) -> tuple[Ran | None, Exception | None]:
        """Run `works` in one forward in the caller's thread, while nothing runs in the instance's own."""
        start = time.perf_counter_ns()
        try:
            return Ran(self._run(works), time.perf_counter_ns() - start), None
        except BaseException as raised:
            return None, harmless(raised)

    async def stop(self, seconds: float) -> None:
        """End the thread, after the forward that it runs; wait for that so long at most."""
        self._jobs.put(None)
        await asyncio.to_thread(self._thread.join, seconds)

    def _serve(self) -> None:
        if self._prepare:
            self._prepare()
        while job := self._jobs.get():
            works, done = job
            try:
                self._loop.call_soon_threadsafe(done, *self.run_here(works))
            except RuntimeError:  # the loop is closed: nobody is there to be told
                return
            # Until the next job comes this thread would keep these rows in memory.
            del job, works, done


def harmless(raised: BaseException) -> Exception:
    """Return an exception that a future takes and that ends neither the loop nor a task."""
    if isinstance(raised, Exception) and not isinstance(raised, StopIteration):
        return raised
    error = RuntimeError(f"the model raised {type(raised).__name__}")
    error.__cause__ = raised
    return error


def deliver(future: "asyncio.Future[T]", result: T | None, error: Exception | None) -> None:
    """End `future`, unless nobody waits for it any more, with what a thread gave: a result, or else an error."""
    if future.done():
        return
    if result is not None:
        future.set_result(result)
    elif error is not None:
        future.set_exception(error)
