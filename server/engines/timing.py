"""Times engines on the batches that they would run, and chooses the cheapest for each bucket."""

import itertools
import logging
import math
import statistics
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from typing import Final

from layercast.server.engines.base import Inputs
from layercast.server.engines.choice import Buckets, Candidate, Choice
from layercast.server.engines.race import Instant, Race, Readings, Run, least, now
from layercast.server.inline import limit

logger = logging.getLogger(__name__)

SLOW: Final = 0.02
"""Seconds of a batch from which on more rows change nothing: larger ones are computed as this one."""

_FLUKES: Final = 8
"""One reading in so many is left out as shorter than what can be had again."""

_CROWDED: Final = 1.2
_LONG: Final = 0.001
_SHARED: Final = 1.15
"""How much longer several threads work on a batch together than one does alone, at most."""
_OTHERS: Final = 2
"""What the processors' time is worth to others, against a batch's own duration: while it runs, the event loop answers
the last one and reads the next, and threads that share a forward wait for each other longer the busier it is."""
_OTHERS_MEANWHILE: Final = 0.5
"""The same for a batch that runs on the event loop: all that it answers and reads waits then, whatever is free."""

_EXTRA: Final = 0.2
"""By how much the logarithms of costs must fall for an engine beside the main one: a fifth of one bucket's cost."""
_EXTRA_THREADS: Final = 0.1
"""The same for one that is the main one with other threads."""

Batch = Callable[[int, int], Inputs]
"""Gives the inputs of a batch by its rows and its length."""

Costs = dict[tuple[int, int], dict[Candidate, float]]
"""Seconds by (length, rows) and candidate; what could not be timed is left out, what failed is infinite."""


def durations(run: Run, inputs: Inputs, runs: int) -> list[float]:
    """Return the seconds of so many runs, after one that warms up."""
    run(inputs)
    found = []
    for _ in range(runs):
        start = time.perf_counter()
        run(inputs)
        found.append(time.perf_counter() - start)
    return found


def fastest(
    runs: Mapping[Candidate, Run],
    batch: Batch,
    buckets: Buckets,
    processors: int,
    here: Collection[Candidate] = (),
    clock: Callable[[], Instant] = now,
) -> tuple[Choice, Costs]:
    """Time `runs` on every bucket and return the choice, and what it rests on.

    A batch costs its duration and, twice, the share of the `processors` that it took, which other models and the event
    loop would have had: two threads that halve a duration are worth it, two that save a fourth of it are not. Where
    those `here` are so quick that it runs on the event loop, its duration counts for more.
    """
    races: dict[tuple[int, int], Race] = {}
    for length in buckets.lengths:
        for rows in buckets.rows:
            weigh = partial(_weighed, rows=rows, processors=processors, here=here)
            race = Race(runs, partial(batch, rows, length), weigh, clock)
            try:
                race.run()
            except ValueError as error:
                logger.warning("no batch of %d rows, %d long, to time engines with: %s", rows, length, error)
                break
            if not race.readings:
                break
            races[length, rows] = race
            if min(map(least, race.readings.values())) > SLOW:
                break
    for race in races.values():  # a machine may have a bad time that is longer than a bucket's
        race.run()
    costs = {cell: race.costs | dict.fromkeys(race.failed, math.inf) for cell, race in races.items()}
    return choose(list(runs), buckets, costs), costs


def _weighed(readings: Readings, rows: int, processors: int, here: Collection[Candidate]) -> dict[Candidate, float]:
    quickest = min((least(taken) for one, taken in readings.items() if one in here), default=math.inf)
    return _costs(readings, (_OTHERS_MEANWHILE if quickest <= limit(rows) else _OTHERS) / processors)


def _costs(readings: Readings, others: float) -> dict[Candidate, float]:
    """Return what each candidate costs, in seconds; a second of processors' time costs `others`.

    The least durations count, since whatever else runs only ever adds. On a machine that is busy, which shows where
    one thread takes longer than its processor's time, no run that is long is left alone, and several threads find no
    free processors; there the processors' time, evenly spread, is taken for the duration. Threads that wait for each
    other in vain spin meanwhile, which is no work: what one alone works tells how much that is at most.
    """
    typical = {candidate: _low(one.cpu for one in taken) for candidate, taken in readings.items()}
    alone = [one.wall / one.cpu for c, taken in readings.items() if c.threads == 1 for one in taken if one.cpu > 0]
    several = any(candidate.threads > 1 for candidate in readings)
    busy = several and bool(alone) and statistics.median(alone) > _CROWDED and min(typical.values()) > _LONG
    if busy:
        for candidate, cpu in typical.items():
            one = typical.get(candidate._replace(threads=1), math.inf)
            typical[candidate] = min(cpu, _SHARED * one)
    return {
        candidate: (cpu / candidate.threads if busy else _low(one.wall for one in readings[candidate])) + others * cpu
        for candidate, cpu in typical.items()
    }


def _low(seconds: Iterable[float]) -> float:
    found = sorted(seconds)
    return found[len(found) // _FLUKES]


def choose(candidates: list[Candidate], buckets: Buckets, costs: Costs) -> Choice:
    """Choose for each length one candidate, or one for the smaller batches and one for the larger.

    More changes than that along the rows are the noise of a busy machine: what differs is what a run costs whatever
    its rows, and what each row costs. A candidate beside the main one must be worth its memory.
    """
    if not costs:
        return Choice.only(candidates[0], buckets)

    def extra(candidate: Candidate) -> float:
        return 0.0 if candidate == main else _EXTRA_THREADS if candidate.engine == main.engine else _EXTRA

    def loss(cells: Iterable[dict[Candidate, float]], candidate: Candidate) -> float:
        return sum(math.log(cost.get(candidate, math.inf)) for cost in cells)

    main = min(candidates, key=lambda candidate: loss(costs.values(), candidate))
    rows: list[tuple[Candidate, ...]] = []
    for length in buckets.lengths:
        cells = [cost for (of, _), cost in costs.items() if of == length]
        plans = [
            (
                sum(map(extra, {small, large})) + loss(cells[:at], small) + loss(cells[at:], large),
                small,
                large,
                at,
            )
            for small, large in itertools.product(candidates, repeat=2)
            for at in range(len(cells) if small != large else 1)
        ]
        _, small, large, at = min(plans, key=lambda plan: plan[0]) if cells else (0, main, main, 0)
        rows.append((small,) * at + (large,) * (len(buckets.rows) - at))
    return Choice(buckets, tuple(rows))
