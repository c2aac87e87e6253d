"""Candidates that take turns to run a batch; those that can't win soon leave the time to the others."""

import logging
import math
import time
from collections.abc import Callable, Mapping
from typing import Final, NamedTuple

from layercast.server import processors
from layercast.server.engines.base import Inputs, Outputs
from layercast.server.engines.choice import Candidate

logger = logging.getLogger(__name__)

_ROUNDS: Final = 20
_LEAST_ROUNDS: Final = 4
"""TorchScript compiles in its second run of a shape; the smallest of four is that of a warm one."""

_ENOUGH: Final = 0.015
"""Seconds for the last of those and for what comes after them, among the candidates that are close."""

_ROUNDS_THERE: Final = 2
"""Rounds on one processor: the system may leave a thread on the same one as another that computes for it, while the
next is idle, for a tenth of a second. In the first round on another one, its caches have nothing of the model."""

_WARM: Final = 3
_HOPELESS: Final = 2.5
_CLOSE: Final = 1.4
"""How many times the least cost a candidate may have to be timed further: most of the time would go to those that
can't win, and what is left to tell two apart that take nearly as long would be a few runs."""
_ANOTHER_CHANCE: Final = 4
"""One round in so many is also for those that are not hopeless, and for the close ones' engines with other threads:
these may have waited for each other, for milliseconds, in all runs."""


Run = Callable[[Inputs], Outputs]


class Instant(NamedTuple):
    """A reading of the wall clock and of the processors' time that this process took, in seconds."""

    wall: float
    cpu: float


Readings = dict[Candidate, list[Instant]]
"""What each run of a batch took."""


def now() -> Instant:
    """Read both clocks."""
    return Instant(time.perf_counter(), time.process_time())


def least(readings: list[Instant]) -> float:
    """Return the shortest duration."""
    return min(one.wall for one in readings)


class Race:
    """What runs of one batch take on each candidate: `readings`, and the candidates that it `failed` on.

    Candidates take turns, so that what disturbs the machine for a moment disturbs all; in the end only those whose
    cost, as `weigh` tells it of readings, is near the least.
    """

    def __init__(
        self,
        runs: Mapping[Candidate, Run],
        batch: Callable[[], Inputs],
        weigh: Callable[[Readings], dict[Candidate, float]],
        clock: Callable[[], Instant],
    ) -> None:
        self.readings: Readings = {candidate: [] for candidate in runs}
        self.failed: list[Candidate] = []
        self._runs = runs
        self._batch = batch
        self._weigh = weigh
        self._clock = clock
        self._rounds = 0

    @property
    def costs(self) -> dict[Candidate, float]:
        """What each candidate costs, by the readings so far."""
        return self._weigh(self.readings)

    def run(self) -> None:
        """Let them take turns for a while: the first time all, later those that are close.

        ValueError when there is no such batch.
        """
        inputs, begun = self._batch(), any(self.readings.values())
        enough = self._clock().wall + _ENOUGH if begun else math.inf
        for at in range(_LEAST_ROUNDS if begun else 0, _LEAST_ROUNDS + _ROUNDS):
            turns = self._hopeful(at)
            if at == _WARM:
                enough = self._clock().wall + _ENOUGH
            if at >= _LEAST_ROUNDS and self._clock().wall > enough:
                break
            processors.elsewhere(self._rounds // _ROUNDS_THERE)
            self._rounds += 1
            for candidate in turns if turns[1:] or at < _LEAST_ROUNDS else ():
                try:
                    self.readings[candidate].append(self._once(self._runs[candidate], inputs))
                except Exception as error:  # of a program that takes only some sizes, say
                    rows = len(next(iter(inputs.values())))
                    logger.warning("%s fails at %d rows: %s: %s", candidate, rows, type(error).__name__, error)
                    self.failed.append(candidate)
                    del self.readings[candidate]

    def _hopeful(self, at: int) -> list[Candidate]:
        """Return the candidates that may still win: first all, then those that don't take many times as long."""
        if at < _WARM or len(self.readings) < 2:
            return list(self.readings)
        if at < _LEAST_ROUNDS:
            seconds = {candidate: least(taken) for candidate, taken in self.readings.items()}
            return _within(_HOPELESS, seconds)
        costs = self.costs
        close = _within(_CLOSE, costs)
        if (at + 1) % _ANOTHER_CHANCE:
            return close
        engines, hopeful = {candidate.engine for candidate in close}, _within(_HOPELESS, costs)
        return [candidate for candidate in costs if candidate in hopeful or candidate.engine in engines]

    def _once(self, run: Run, inputs: Inputs) -> Instant:
        start = self._clock()
        run(inputs)
        end = self._clock()
        return Instant(end.wall - start.wall, end.cpu - start.cpu)


def _within(factor: float, seconds: Mapping[Candidate, float]) -> list[Candidate]:
    most = factor * min(seconds.values())
    return [candidate for candidate, each in seconds.items() if each <= most]
