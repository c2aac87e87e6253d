"""A batcher on a model that negates, an observer that remembers, and engines that wait to be let go."""

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import numpy as np

from layercast.server.batching.batcher import Batcher
from layercast.server.batching.policy import Execution, Limits
from layercast.server.work import Rows, Terms, Work

LONG = 60.0
Run = Callable[[Sequence[Work]], Sequence[Rows]]


class Recorder:
    """An observer that remembers."""

    def __init__(self) -> None:
        self.executions: list[Execution] = []
        self.rejections: Counter[str] = Counter()
        self.expiries: Counter[str] = Counter()
        self.cancels: Counter[str] = Counter()
        self.waits: list[float] = []
        self.waiting = 0
        self.bytes = 0

    @property
    def batches(self) -> list[tuple[int, str]]:
        return [(execution.rows, execution.reason) for execution in self.executions]

    def queued(self, rows: int, size: int) -> None:
        self.waiting, self.bytes = rows, size

    def waited(self, seconds: float, requests: int) -> None:
        assert seconds >= 0
        self.waits.append(seconds)

    def executed(self, execution: Execution) -> None:
        assert execution.compute_ns > 0
        self.executions.append(execution)

    def rejected(self, reason: str) -> None:
        self.rejections[reason] += 1

    def expired(self, when: str) -> None:
        self.expiries[when] += 1

    def cancelled(self, when: str) -> None:
        self.cancels[when] += 1


def negate(works: Sequence[Work]) -> list[Rows]:
    """Join, negate, split: the answer depends on the row, so a swapped row shows."""
    joined = -np.concatenate([work.inputs["x"] for work in works])
    ends = np.cumsum([work.rows for work in works])
    return [Rows({"y": joined[end - work.rows : end]}, {}) for work, end in zip(works, ends, strict=True)]


def picky(works: Sequence[Work]) -> list[Rows]:
    """Negate, but raise for a batch with a negative row."""
    if any((work.inputs["x"] < 0).any() for work in works):
        raise ValueError("negative")
    return negate(works)


class Held:
    """An engine that notes what it runs and, while held, says that it was entered and stays until it may leave."""

    def __init__(self, run: Run = negate) -> None:
        self.ran: list[list[float]] = []
        self.entered, self.leave = threading.Event(), threading.Event()
        self._run = run

    def __call__(self, works: Sequence[Work]) -> Sequence[Rows]:
        self.ran.append([float(value) for work in works for value in work.inputs["x"][:, 0]])
        self.entered.set()
        assert self.leave.wait(30)
        return self._run(works)


@asynccontextmanager
async def batching(
    *runs: Run, max_batch: int = 8, delay: float = 0.0, queue_rows: int = 100, alone: Run | None = None, **limits: Any
) -> AsyncIterator[tuple[Batcher, Recorder]]:
    recorder = Recorder()
    batcher = Batcher("m", runs or [negate], Limits(max_batch, delay, queue_rows, **limits), recorder, alone=alone)
    try:
        yield batcher, recorder
    finally:
        for run in (*runs, alone):
            if isinstance(run, Held):
                run.leave.set()
        await batcher.close()


def work(batcher: Batcher, *values: float, key: str = "k") -> Work:
    x = np.array(values, "f4")[:, None]
    return Work({"x": x}, len(values), key, bytes=x.nbytes)


async def ask(batcher: Batcher, *values: float, key: str = "k", **terms: Any) -> list[float]:
    (answer,) = await batcher.submit([work(batcher, *values, key=key)], Terms(**terms))
    return [float(v) for v in answer.outputs["y"][:, 0]]


def asking(batcher: Batcher, *values: float, key: str = "k", **terms: Any) -> "asyncio.Task[list[float]]":
    return asyncio.create_task(ask(batcher, *values, key=key, **terms))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0)
