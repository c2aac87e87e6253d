"""Times engines on the batches that they would run, and chooses the cheapest for each bucket."""

import itertools
import logging
import math
import statistics
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Final, NamedTuple

from layercast.server.engines.base import Inputs, Outputs
from layercast.server.engines.choice import Buckets, Candidate, Choice
from layercast.server.inline import limit

logger = logging.getLogger(__name__)

_ROUNDS: Final = 40
_LEAST_ROUNDS: Final = 4
"""TorchScript compiles in its second run of a shape; the smallest of four is that of a warm one."""

_ENOUGH: Final = 0.03
"""Seconds for the rounds of one bucket that come after those, among the candidates that are close."""

SLOW: Final = 0.02
"""Seconds of a batch from which on more rows change nothing: larger ones are computed as this one."""

_WARM: Final = 3
_HOPELESS: Final = 2.5
_CLOSE: Final = 1.4
"""How many times the least cost a candidate may have to be timed further: most of the time would go to those that
can't win, and what is left to tell two apart that take nearly as long would be a few runs."""
_ANOTHER_CHANCE: Final = 4
"""One round in so many is one for all but the hopeless: a candidate may have met a bad moment in all its runs."""

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

Run = Callable[[Inputs], Outputs]
Batch = Callable[[int, int], Inputs]
"""Gives the inputs of a batch by its rows and its length."""

Costs = dict[tuple[int, int], dict[Candidate, float]]
"""Seconds by (length, rows) and candidate; what could not be timed is left out, what failed is infinite."""


class Instant(NamedTuple):
    """A reading of the wall clock and of the processors' time that this process took, in seconds."""

    wall: float
    cpu: float


Readings = dict[Candidate, list[Instant]]
"""What each run of a batch took."""


def now() -> Instant:
    """Read both clocks."""
    return Instant(time.perf_counter(), time.process_time())


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
    costs: Costs = {}
    for length in buckets.lengths:
        for rows in buckets.rows:

            def cost(readings: Readings, rows: int = rows) -> dict[Candidate, float]:
                quickest = min((_least(taken) for one, taken in readings.items() if one in here), default=math.inf)
                return _costs(readings, (_OTHERS_MEANWHILE if quickest <= limit(rows) else _OTHERS) / processors)

            measured = _measure(runs, batch, rows, length, cost, clock)
            if measured is None:
                break
            readings, failed = measured
            costs[length, rows] = cost(readings) | dict.fromkeys(failed, math.inf)
            if min(map(_least, readings.values())) > SLOW:
                break
    return choose(list(runs), buckets, costs), costs


def _measure(
    runs: Mapping[Candidate, Run],
    batch: Batch,
    rows: int,
    length: int,
    cost: Callable[[Readings], dict[Candidate, float]],
    clock: Callable[[], Instant],
) -> tuple[Readings, list[Candidate]] | None:
    """Return what runs of a batch took on each candidate, and those that it fails on; None when it runs on none.

    Candidates take turns, so that what disturbs the machine for a moment disturbs all; in the end only those whose
    `cost` is near the least.
    """
    try:
        inputs = batch(rows, length)
    except ValueError as error:
        logger.warning("no batch of %d rows, %d long, to time engines with: %s", rows, length, error)
        return None
    readings: Readings = {candidate: [] for candidate in runs}
    failed: list[Candidate] = []
    enough = math.inf
    for at in range(_ROUNDS):
        turns = _hopeful(readings, at, cost)
        if at == _LEAST_ROUNDS:
            enough = clock().wall + _ENOUGH
        if at >= _LEAST_ROUNDS and clock().wall > enough:
            break
        for candidate in turns if turns[1:] or at < _LEAST_ROUNDS else ():
            try:
                readings[candidate].append(_once(runs[candidate], inputs, clock))
            except Exception as error:  # of a program that takes only some sizes, say
                logger.warning("%s fails at %d rows: %s: %s", candidate, rows, type(error).__name__, error)
                failed.append(candidate)
                del readings[candidate]
    return (readings, failed) if readings else None


def _hopeful(readings: Readings, at: int, cost: Callable[[Readings], dict[Candidate, float]]) -> list[Candidate]:
    """Return the candidates that may still win: first all, then those that don't take many times as long."""
    if at < _WARM or len(readings) < 2:
        return list(readings)
    if at < _LEAST_ROUNDS:
        most = _HOPELESS * min(map(_least, readings.values()))
        return [candidate for candidate, taken in readings.items() if _least(taken) <= most]
    costs = cost(readings)
    most = (_CLOSE if (at + 1) % _ANOTHER_CHANCE else _HOPELESS) * min(costs.values())
    return [candidate for candidate, seconds in costs.items() if seconds <= most]


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


def _least(readings: list[Instant]) -> float:
    return min(one.wall for one in readings)


def _once(run: Run, inputs: Inputs, clock: Callable[[], Instant]) -> Instant:
    start = clock()
    run(inputs)
    end = clock()
    return Instant(end.wall - start.wall, end.cpu - start.cpu)


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
