"""One copy of a model in a thread of its own."""

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from layercast.server.work import Rows, Work

T = TypeVar("T")

Run = Callable[[Sequence[Work]], Sequence[Rows]]
"""Runs works that may share a forward, in the instance's thread; returns the rows of each, in order."""


class Ran(NamedTuple):
    """The rows of each work, and how long the forward took."""

    rows: Sequence[Rows]
    compute_ns: int


class Instance:
    """Runs batches one at a time. `prepare` is called in the thread before anything else.

    The thread is a daemon, so that a forward that never ends can't keep the process alive.
    """

    def __init__(self, name: str, run: Run, prepare: Callable[[], None] | None = None) -> None:
        self._run = run
        self._prepare = prepare
        self._loop = asyncio.get_running_loop()
        self._jobs: queue.SimpleQueue[tuple[Sequence[Work], asyncio.Future[Ran]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._thread.start()

    async def run(self, works: Sequence[Work]) -> Ran:
        """Run `works` in one forward. Raises what the model raises."""
        future: asyncio.Future[Ran] = self._loop.create_future()
        self._jobs.put((works, future))
        return await future

    async def stop(self, seconds: float) -> None:
        """End the thread, after the forward that it runs; wait for that so long at most."""
        self._jobs.put(None)
        await asyncio.to_thread(self._thread.join, seconds)

    def _serve(self) -> None:
        if self._prepare:
            self._prepare()
        while job := self._jobs.get():
            works, future = job
            ran: Ran | None = None
            error: Exception | None = None
            start = time.perf_counter_ns()
            try:
                ran = Ran(self._run(works), time.perf_counter_ns() - start)
            except BaseException as raised:
                error = harmless(raised)
            try:
                self._loop.call_soon_threadsafe(deliver, future, ran, error)
            except RuntimeError:  # the loop is closed: nobody is there to be told
                return


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
