"""Runs batches: each in the thread of a free instance, or on the event loop where it is sure to be over sooner.

To hand a batch to a thread and back takes a tenth of a millisecond of a processor, more while the loop is busy. Small
models have answered by then.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import Final

from layercast.server.batching.gather import Batch
from layercast.server.batching.instance import Instance, Ran, Run
from layercast.server.batching.policy import Limits, Reason
from layercast.server.errors import ModelFailed, OutOfMemory
from layercast.server.inline import limit
from layercast.server.work import Work

logger = logging.getLogger(__name__)

Answer = Callable[[Sequence[Work], Ran, Reason], None]
Fail = Callable[[Sequence[Work], Exception], None]

_SURPRISE: Final = 4
"""How many times as long as it may no forward on the loop should take."""
_MOST_SURPRISES: Final = 3
"""As many that do send the model's forwards to its threads,"""
_AMONG: Final = 32
"""among the last so many on the loop,"""
_STALL_NS: Final = 17_000_000
"""or a single one that takes so much longer still."""
_WARY_NS: Final = 1_000_000_000
"""How long they stay there."""


class Forwards:
    """The instances of one model, and the works that run on them.

    `answer` is given what each forward gave, `fail` the works that get no answer, and why. `freed` is called when
    an instance can take the next batch, `over` when the works of one that ran in a thread are told. `limits` say which
    batches run on the loop. `alone`, if given, runs in place of an instance a batch beside which nothing else of the
    model runs or waits; its thread is prepared as that of the instance after the last.
    """

    def __init__(
        self,
        name: str,
        runs: Sequence[Run],
        prepare: Callable[[int], None] | None,
        limits: Limits,
        answer: Answer,
        fail: Fail,
        freed: Callable[[], None],
        over: Callable[[], None],
        alone: Run | None = None,
    ) -> None:
        self.running: set[Work] = set()
        self._name = name
        self._on_loop = limits.inline
        self._answer = answer
        self._fail = fail
        self._freed = freed
        self._over = over
        self._inline_runs = self._wary_until = 0
        self._surprises: deque[int] = deque(maxlen=_MOST_SURPRISES)
        self._apart_tasks: set[asyncio.Task[None]] = set()
        self._closed = False
        self._instances = [
            Instance(f"layercast-{name}-{at}", run, prepare and partial(prepare, at)) for at, run in enumerate(runs)
        ]
        # The one that ran last runs next, as long as it is enough: its memory is still in the processor's caches.
        self._free = self._instances[::-1]
        self._alone = alone and Instance(f"layercast-{name}-alone", alone, prepare and partial(prepare, len(runs)))

    def __len__(self) -> int:
        """Return how many batches run at the same time at most."""
        return len(self._instances)

    @property
    def free(self) -> int:
        """How many instances wait for a batch."""
        return len(self._free)

    def inline(self, rows: int, requests: int, length: int) -> bool:
        """Tell whether a plain forward of so many rows of so many requests, so long, would run on the loop now."""
        return self._on_loop.takes(rows, requests, length) and (
            not self._wary_until or time.perf_counter_ns() >= self._wary_until
        )

    def holds_up(self, rows: int, requests: int, length: int) -> bool:
        """Tell whether that would take longer than anything but what answers so many requests may take."""
        return self.inline(rows, requests, length) and not self._on_loop.takes(rows, 0, length)

    def start(self, batch: Batch, requests: int, here: bool, last: bool) -> bool:
        """Run `batch`, of so many requests, on a free instance; tell whether it has ended, on the event loop.

        It does so only if `here`, and only a batch of plain predictions that is short. `last` says that nothing waits.
        """
        alone = self._alone if last and len(self._free) == len(self._instances) else None
        instance, works = self._free.pop(), batch.works
        self.running.update(works)
        length = max(work.length for work in works) if self._on_loop.lengths else 0
        short = here and self.inline(batch.rows, requests, length)
        if not short or any(work.taps or work.edits for work in works):
            # The instance in whose place another runs it stays taken: no more batches run at the same time than that.
            (alone or instance).start(works, partial(self._ran, instance, batch))
            return False
        began = time.perf_counter_ns()
        ran, error = instance.run_here(works)
        self._judge(time.perf_counter_ns() - began, requests)
        if self._goes_on_apart(instance, batch, error):
            return False
        self._tell(works, ran, error, batch.reason)
        self.running.difference_update(works)
        self._free.append(instance)
        return True

    def _judge(self, took_ns: int, requests: int) -> None:
        """Leave the loop to others for a while when forwards on it take longer than was measured at the load."""
        self._inline_runs += 1
        most_ns = int(_SURPRISE * 1e9 * limit(requests))
        if took_ns <= most_ns:
            return
        # A short one alone says nothing of the model: on a busy machine the thread may have been put aside meanwhile.
        self._surprises.append(self._inline_runs)
        often = len(self._surprises) == _MOST_SURPRISES and self._inline_runs - self._surprises[0] < _AMONG
        if often or took_ns > most_ns + _STALL_NS:
            self._surprises.clear()
            self._wary_until = time.perf_counter_ns() + _WARY_NS

    def cancel(self) -> None:
        """Tell nobody any more how forwards end."""
        self._closed = True
        for task in self._apart_tasks:
            task.cancel()

    async def stop(self, seconds: float) -> None:
        """End the threads; wait so long at most for the forwards that they run."""
        every = [*self._instances, *filter(None, [self._alone])]
        await asyncio.gather(*(instance.stop(seconds) for instance in every), return_exceptions=True)
        # What is left refers to itself; a model must not wait for a garbage collection to leave memory.
        self._instances.clear()
        self._free.clear()
        self._alone = None

    def _ran(self, instance: Instance, batch: Batch, ran: Ran | None, error: Exception | None) -> None:
        """Take what an instance's thread gave. The next batch runs while this one is answered."""
        if self._closed or self._goes_on_apart(instance, batch, error):
            return
        self._free.append(instance)
        try:
            self._freed()
        finally:
            self._tell(batch.works, ran, error, batch.reason)
            self.running.difference_update(batch.works)
            self._over()

    def _goes_on_apart(self, instance: Instance, batch: Batch, error: Exception | None) -> bool:
        """Tell whether the works of a batch run again, because the model raised: so that only the culprit fails.

        A model that breaks its contract does so for every row: the whole batch fails, and nothing is run again.
        """
        if error is None or not _separable(batch.works, error):
            return False
        task = asyncio.get_running_loop().create_task(self._apart(instance, batch, error))
        self._apart_tasks.add(task)
        task.add_done_callback(self._apart_tasks.discard)
        return True

    async def _apart(self, instance: Instance, batch: Batch, error: Exception) -> None:
        await self._again(instance, batch.works, error, batch.reason)
        self.running.difference_update(batch.works)
        self._free.append(instance)
        self._freed()

    async def _again(self, instance: Instance, works: Sequence[Work], error: Exception, reason: Reason) -> None:
        """Run works, whose forward ended with `error`, in parts: each alone, or halves where memory ran out."""
        parts = _halves(works) if isinstance(error, OutOfMemory) else [[work] for work in works]
        for part in parts:
            alive = [work for work in part if work.alive(time.perf_counter_ns())]
            if not alive:
                continue
            try:
                ran = await instance.run(alive)
            except Exception as raised:
                if _separable(alive, raised):
                    await self._again(instance, alive, raised, reason)
                else:
                    self._tell(alive, None, raised, reason)
            else:
                self._tell(alive, ran, None, reason)

    def _tell(self, works: Sequence[Work], ran: Ran | None, error: Exception | None, reason: Reason) -> None:
        if ran is None:
            self._fail(works, error or ModelFailed("this is a bug: a forward ended without result or error"))
        elif len(ran.rows) != len(works):
            bug = f"this is a bug: {len(works)} works ran and {len(ran.rows)} results came back"
            self._fail(works, ModelFailed(bug))
        else:
            try:
                self._answer(works, ran, reason)
            except Exception as raised:
                logger.exception("the batcher of model %s failed", self._name)
                self._fail(works, raised)


def _separable(works: Sequence[Work], error: Exception) -> bool:
    """Tell whether some of the works may well run where all together did not."""
    return len(works) > 1 and not isinstance(error, ModelFailed)


def _halves(works: Sequence[Work]) -> tuple[Sequence[Work], Sequence[Work]]:
    """Return works in two parts, neither empty, with about as many rows each."""
    ends = list(accumulate(work.rows for work in works))
    middle = min(range(1, len(works)), key=lambda at: abs(2 * ends[at - 1] - ends[-1]))
    return works[:middle], works[middle:]
