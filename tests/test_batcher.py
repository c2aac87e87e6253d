"""The batcher, with races made by its gate instead of by sleeping."""

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import numpy as np
import pytest

from layercast.server.batcher import Batcher, Limits
from layercast.server.errors import DeadlineExceeded, InvalidArgument, Unavailable
from layercast.server.work import Rows, Work

LONG = 60.0


class Recorder:
    """An observer that remembers."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, str]] = []
        self.rejections: Counter[str] = Counter()
        self.cancels: Counter[str] = Counter()
        self.waiting = 0

    def queued(self, rows: int) -> None:
        self.waiting = rows

    def waited(self, seconds: float) -> None:
        assert seconds >= 0

    def executed(self, rows: int, reason: str, compute_ns: int) -> None:
        assert compute_ns > 0
        self.batches.append((rows, reason))

    def rejected(self, reason: str) -> None:
        self.rejections[reason] += 1

    def cancelled(self, when: str) -> None:
        self.cancels[when] += 1


def negate(works: Sequence[Work]) -> list[Rows]:
    """Join, negate, split: the answer depends on the row, so a swapped row shows."""
    joined = -np.concatenate([work.inputs["x"] for work in works])
    ends = np.cumsum([work.rows for work in works])
    return [Rows({"y": joined[end - work.rows : end]}, {}) for work, end in zip(works, ends, strict=True)]


def held() -> tuple[Callable[[Sequence[Work]], list[Rows]], threading.Event, threading.Event]:
    """An engine that says when it was entered and stays until it may leave."""
    entered, leave = threading.Event(), threading.Event()

    def slow(works: Sequence[Work]) -> list[Rows]:
        entered.set()
        assert leave.wait(10)
        return negate(works)

    return slow, entered, leave


@asynccontextmanager
async def batching(
    run: Callable[[Sequence[Work]], Sequence[Rows]] = negate,
    max_batch: int = 8,
    delay: float = 0.0,
    queue_rows: int = 100,
) -> AsyncIterator[tuple[Batcher, Recorder]]:
    recorder = Recorder()
    batcher = Batcher("m", run, Limits(max_batch, delay, queue_rows), recorder)
    try:
        yield batcher, recorder
    finally:
        await batcher.close()


def work(batcher: Batcher, *values: float, key: str = "k") -> Work:
    return Work({"x": np.array(values, "f4")[:, None]}, len(values), key, batcher.future())


async def ask(batcher: Batcher, *values: float, key: str = "k", deadline: float | None = None) -> list[float]:
    (answer,) = await batcher.submit([work(batcher, *values, key=key)], deadline)
    return [float(v) for v in answer.outputs["y"][:, 0]]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0)


async def test_rows_that_wait_run_together_and_each_gets_its_own():
    async with batching() as (batcher, recorder):
        batcher.hold()
        asked = [asyncio.create_task(ask(batcher, *([i] * (i % 2 + 1)))) for i in range(1, 6)]
        await until(lambda: recorder.waiting == 8)
        batcher.release()
        assert await asyncio.gather(*asked) == [[-i] * (i % 2 + 1) for i in range(1, 6)]
        assert recorder.batches == [(8, "full")]


async def test_one_row_more_than_a_batch_takes_two_executions():
    async with batching() as (batcher, recorder):
        batcher.hold()
        asked = [asyncio.create_task(ask(batcher, i)) for i in range(9)]
        await until(lambda: recorder.waiting == 9)
        batcher.release()
        assert await asyncio.gather(*asked) == [[-i] for i in range(9)]
        assert recorder.batches == [(8, "full"), (1, "idle")]


async def test_an_idle_engine_without_delay_runs_at_once():
    async with batching() as (batcher, recorder):
        assert await ask(batcher, 3) == [-3]
        assert recorder.batches == [(1, "idle")]


async def test_the_delay_ends_a_batch_that_does_not_fill():
    async with batching(delay=0.01) as (batcher, recorder):
        assert await ask(batcher, 3) == [-3]
        assert recorder.batches == [(1, "timeout")]


async def test_a_full_batch_does_not_wait_for_the_delay():
    async with batching(max_batch=2, delay=LONG) as (batcher, recorder):
        async with asyncio.timeout(10):
            assert await asyncio.gather(ask(batcher, 1), ask(batcher, 2)) == [[-1], [-2]]
        assert recorder.batches == [(2, "full")]


async def test_what_waits_while_the_engine_is_busy_runs_together_next():
    slow, entered, leave = held()
    async with batching(slow) as (batcher, recorder):
        first = asyncio.create_task(ask(batcher, 1))
        await until(entered.is_set)
        rest = [asyncio.create_task(ask(batcher, i)) for i in range(2, 6)]
        await until(lambda: recorder.waiting == 4)
        leave.set()
        assert await asyncio.gather(first, *rest) == [[-i] for i in range(1, 6)]
        assert [rows for rows, _ in recorder.batches] == [1, 4]


async def test_rows_of_different_keys_never_share_a_forward():
    async with batching() as (batcher, recorder):
        batcher.hold()
        asked = [asyncio.create_task(ask(batcher, i, key="ab"[i % 2])) for i in range(6)]
        await until(lambda: recorder.waiting == 6)
        batcher.release()
        assert await asyncio.gather(*asked) == [[-i] for i in range(6)]
        assert [rows for rows, _ in recorder.batches] == [3, 3]


async def test_a_cancelled_row_leaves_the_queue_and_never_runs():
    async with batching() as (batcher, recorder):
        batcher.hold()
        kept, gone = asyncio.create_task(ask(batcher, 1)), asyncio.create_task(ask(batcher, 2))
        await until(lambda: recorder.waiting == 2)
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        assert batcher.queued_rows == 1
        batcher.release()
        assert await kept == [-1]
        assert recorder.batches == [(1, "idle")]
        assert recorder.cancels == {"queued": 1}


async def test_a_caller_who_leaves_while_running_harms_nobody():
    slow, entered, leave = held()
    async with batching(slow) as (batcher, recorder):
        batcher.hold()
        kept, gone = asyncio.create_task(ask(batcher, 1)), asyncio.create_task(ask(batcher, 2))
        await until(lambda: recorder.waiting == 2)
        batcher.release()
        await until(entered.is_set)
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        leave.set()
        assert await kept == [-1]
        assert recorder.cancels == {"running": 1}
        assert await ask(batcher, 3) == [-3]


async def test_a_passed_deadline_is_told_at_once_and_the_row_never_runs():
    async with batching() as (batcher, recorder):
        batcher.hold()
        kept = asyncio.create_task(ask(batcher, 1))
        await until(lambda: recorder.waiting == 1)
        with pytest.raises(DeadlineExceeded):
            await ask(batcher, 2, deadline=asyncio.get_running_loop().time() + 0.01)
        assert batcher.queued_rows == 1
        assert recorder.rejections == {"deadline": 1}
        batcher.release()
        assert await kept == [-1]
        assert recorder.batches == [(1, "idle")]


async def test_a_full_queue_refuses_exactly_the_overflow_at_once():
    async with batching(queue_rows=4) as (batcher, recorder):
        batcher.hold()
        kept = [asyncio.create_task(ask(batcher, i)) for i in range(4)]
        await until(lambda: recorder.waiting == 4)
        for i in range(4, 7):
            with pytest.raises(Unavailable, match="4 of 4 rows wait") as refused:
                await ask(batcher, i)
            assert refused.value.retry_after
        batcher.release()
        assert await asyncio.gather(*kept) == [[-i] for i in range(4)]
        assert recorder.rejections == {"queue_full": 3}
        assert recorder.waiting == 0


async def test_a_request_of_several_works_is_admitted_whole_or_not_at_all():
    async with batching(queue_rows=4) as (batcher, recorder):
        batcher.hold()
        kept = asyncio.create_task(ask(batcher, 1, 2))
        await until(lambda: recorder.waiting == 2)
        with pytest.raises(Unavailable):
            await batcher.submit([work(batcher, 3, 4), work(batcher, 5)])
        assert batcher.queued_rows == 2
        batcher.release()
        assert await kept == [-1, -2]


async def test_a_request_that_can_never_fit_is_the_callers_fault():
    async with batching(queue_rows=4) as (batcher, recorder):
        with pytest.raises(InvalidArgument, match="5 rows, the queue holds 4"):
            await ask(batcher, 1, 2, 3, 4, 5)
        assert recorder.rejections == {"too_large": 1}


async def test_a_poisoned_row_fails_alone():
    def picky(works: Sequence[Work]) -> list[Rows]:
        if any((w.inputs["x"] < 0).any() for w in works):
            raise ValueError("negative")
        return negate(works)

    async with batching(picky) as (batcher, recorder):
        batcher.hold()
        asked = [asyncio.create_task(ask(batcher, -9 if i == 3 else i)) for i in range(8)]
        await until(lambda: recorder.waiting == 8)
        batcher.release()
        results = await asyncio.gather(*asked, return_exceptions=True)
        assert [r for i, r in enumerate(results) if i != 3] == [[-i] for i in range(8) if i != 3]
        assert isinstance(results[3], ValueError)
        assert await ask(batcher, 5) == [-5]


async def test_a_run_that_loses_a_result_fails_and_the_next_batch_is_fine():
    calls = []

    def forgetful(works: Sequence[Work]) -> list[Rows]:
        calls.append(len(works))
        return negate(works)[: -1 if len(calls) == 1 else None]

    async with batching(forgetful) as (batcher, _):
        with pytest.raises(ValueError, match="1 works ran and 0 results"):
            await ask(batcher, 1)
        assert await ask(batcher, 2) == [-2]


@pytest.mark.parametrize("error", [StopIteration, asyncio.CancelledError, TimeoutError])
async def test_an_exception_that_means_something_to_asyncio_is_the_models_own(error):
    calls = []

    def strange(works: Sequence[Work]) -> list[Rows]:
        calls.append(1)
        if len(calls) == 1:
            raise error
        return negate(works)

    async with batching(strange) as (batcher, _), asyncio.timeout(10):
        with pytest.raises(TimeoutError if error is TimeoutError else RuntimeError):
            await ask(batcher, 1)
        assert await ask(batcher, 2) == [-2]


async def test_draining_answers_what_was_admitted_and_refuses_the_rest():
    async with batching(delay=LONG) as (batcher, recorder):
        asked = [asyncio.create_task(ask(batcher, i)) for i in range(6)]
        await until(lambda: recorder.waiting == 6)
        async with asyncio.timeout(10):
            await batcher.drain()
        assert await asyncio.gather(*asked) == [[-i] for i in range(6)]
        assert recorder.batches == [(6, "drain")]
        with pytest.raises(Unavailable, match="shutting down"):
            await ask(batcher, 7)


async def test_closing_fails_what_waits_instead_of_leaving_it():
    async with batching() as (batcher, recorder):
        batcher.hold()
        asked = asyncio.create_task(ask(batcher, 1))
        await until(lambda: recorder.waiting == 1)
        await batcher.close()
        with pytest.raises(Unavailable, match="stopped before the rows ran"):
            await asked


async def test_one_failed_part_takes_the_requests_other_parts_out_of_the_queue():
    def picky(works: Sequence[Work]) -> list[Rows]:
        if any((w.inputs["x"] < 0).any() for w in works):
            raise ValueError("negative")
        return negate(works)

    async with batching(picky, max_batch=1) as (batcher, recorder):
        batcher.hold()
        asked = asyncio.create_task(batcher.submit([work(batcher, -1), work(batcher, 2), work(batcher, 3)]))
        await until(lambda: recorder.waiting == 3)
        batcher.release()
        with pytest.raises(ValueError, match="negative"):
            await asked
        assert batcher.queued_rows == 0
        assert await ask(batcher, 4) == [-4]
