"""Whether one instance of a model answers more, with all processors, or one for each processor, at the same time."""

import logging
import math
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from layercast.server import processors
from layercast.server.engines.base import Inputs
from layercast.server.engines.choice import Buckets
from layercast.server.engines.race import Run
from layercast.server.engines.timing import SLOW, Batch

logger = logging.getLogger(__name__)

MOST_TRIED: Final = 8
"""Instances that are tried at most: threads that end and begin forwards more often than that wait for Python's lock."""

WORTH: Final = 0.9
"""How many times as many rows several must answer. In the server they gain more than measured here, where nothing else
runs: a forward on all processors waits whenever the event loop, or what else the machine does, has one of them."""

SHORTER: Final = 0.75
"""What part of the time a batch that runs alone must take on all processors: weights may lie in memory twice for it."""

_ROUNDS: Final = 12
_LEAST_ROUNDS: Final = 4
_ENOUGH: Final = 0.06
"""Seconds for the runs of one size, after which only the least rounds are made,"""
_ENOUGH_CLOSE: Final = 0.3
"""or as long as this where both ways take nearly as long,"""
_CLOSE: Final = 1.2
"""which is up to so many times."""

_ROWS_EACH: Final = 2
"""Smaller batches are rare where a model has so much to do that it matters."""

AtOnce = Callable[[Run, Inputs], None]
"""Runs the same batch once in every instance, at the same time."""


class Team:
    """Threads that each run a batch at the same time, computing it alone."""

    def __init__(self, threads: int) -> None:
        self.size = threads
        self._pool = ThreadPoolExecutor(threads, "layercast-timed", processors.prepare, (1,))

    def __call__(self, run: Run, inputs: Inputs) -> None:
        """Run `inputs` in every thread; raises what one of them raises."""
        for done in [self._pool.submit(run, inputs) for _ in range(self.size)]:
            done.result()

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()


def gain(
    one: Run,
    several: Run,
    at_once: AtOnce,
    count: int,
    batch: Batch,
    buckets: Buckets,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Return how many times as many rows a second `count` instances run as a single one; 0 where they fail.

    The instances share the rows that the single one runs together, as they share what waits. Both take turns, so that
    what disturbs the machine for a moment disturbs both, and the least duration of each counts. The mean is over the
    batches with rows for all.
    """
    logarithms: list[float] = []
    for length in buckets.lengths:
        for rows in buckets.rows:
            if rows < _ROWS_EACH * count:
                continue
            try:
                whole, part = batch(rows, length), batch(rows // count, length)
                single, together = _least(lambda: one(whole), lambda: at_once(several, part), clock)  # noqa: B023
            except Exception as error:  # of a module that no two threads may run, say
                logger.warning("one instance, since several can't be timed: %s: %s", type(error).__name__, error)
                return 0.0
            logarithms.append(math.log(single / together * (rows // count * count) / rows))
            if single > SLOW:
                break
    return math.exp(sum(logarithms) / len(logarithms)) if logarithms else 0.0


def part(
    alone: Run,
    shared: Run,
    batch: Batch,
    sizes: Iterable[tuple[int, int, bool]],
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Return what part of the time on `shared` a batch takes on `alone`, the mean over `sizes`.

    Those are the length and rows of batches, and whether they run on other engines there, the smallest of each length
    first. Of a length, what follows a slow one is taken for like it.
    """
    logarithms: list[float] = []
    slow: dict[int, float] = {}
    for length, rows, differs in sizes:
        if not differs or length in slow:
            logarithms.append(slow[length] if differs else 0.0)
            continue
        try:
            inputs = batch(rows, length)
            shorter, longer = _least(lambda: alone(inputs), lambda: shared(inputs), clock)  # noqa: B023
        except Exception as error:
            logger.warning("no engine for lone batches, since they fail: %s: %s", type(error).__name__, error)
            return 1.0
        logarithms.append(math.log(shorter / longer))
        if longer > SLOW:
            slow[length] = logarithms[-1]
    return math.exp(sum(logarithms) / len(logarithms)) if logarithms else 1.0


def _least(
    first: Callable[[], object], second: Callable[[], object], clock: Callable[[], float]
) -> tuple[float, float]:
    """Return the shortest duration of both, which take turns, on one processor after the other (see `race`)."""
    shortest = [math.inf, math.inf]
    began = clock()
    for at in range(_ROUNDS):
        if at >= _LEAST_ROUNDS:
            close = max(shortest) <= _CLOSE * min(shortest)
            if clock() - began > (_ENOUGH_CLOSE if close else _ENOUGH):
                break
        processors.elsewhere(at)
        for which, run in enumerate((first, second)):
            start = clock()
            run()
            shortest[which] = min(shortest[which], clock() - start)
    return shortest[0], shortest[1]
