"""The batcher, with races made by its gate instead of by sleeping: how batches form, what one request's answer says."""

import asyncio
import threading
import time
from collections.abc import Sequence

import pytest
from batching import LONG, Held, ask, asking, batching, negate, until, work

from layercast.server.errors import InvalidArgument, Unavailable
from layercast.server.work import Rows, Work


async def test_rows_that_wait_run_together_and_each_gets_its_own():
    async with batching() as (batcher, recorder):
        batcher.hold()
        asked = [asking(batcher, *([i] * (i % 2 + 1))) for i in range(1, 6)]
        await until(lambda: recorder.waiting == 8)
        batcher.release()
        assert await asyncio.gather(*asked) == [[-i] * (i % 2 + 1) for i in range(1, 6)]
        assert recorder.batches == [(8, "full")]


async def test_one_row_more_than_a_batch_takes_two_executions():
    async with batching() as (batcher, recorder):
        batcher.hold()
        asked = [asking(batcher, i) for i in range(9)]
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


async def test_a_full_group_does_not_wait_behind_an_older_row_of_another():
    async with batching(max_batch=2, delay=LONG) as (batcher, recorder), asyncio.timeout(10):
        lone = asking(batcher, 1, key="a")
        await until(lambda: recorder.waiting == 1)
        assert await asyncio.gather(ask(batcher, 2, key="b"), ask(batcher, 3, key="b")) == [[-2], [-3]]
        assert not lone.done()
        assert await asyncio.gather(ask(batcher, 4, key="a"), lone) == [[-4], [-1]]


async def test_a_small_group_is_served_between_full_ones_once_its_delay_is_over():
    engine = Held()
    async with batching(engine, max_batch=2, delay=0.02) as (batcher, recorder):
        first = asking(batcher, 9, 9, key="full")
        await until(engine.entered.is_set)
        before = [asking(batcher, i, i, key="full") for i in range(2)]
        lone = asking(batcher, 5, key="small")
        await until(lambda: recorder.waiting == 5)
        lone_ready = time.perf_counter() + 0.02
        after = [asking(batcher, i, i, key="full") for i in range(2, 4)]
        await until(lambda: recorder.waiting == 9 and time.perf_counter() > lone_ready)
        engine.leave.set()
        await asyncio.gather(first, lone, *before, *after)
        assert engine.ran == [[9, 9], [0, 0], [1, 1], [5], [2, 2], [3, 3]]


async def test_what_waits_while_the_engine_is_busy_runs_together_next():
    engine = Held()
    async with batching(engine) as (batcher, recorder):
        first = asking(batcher, 1)
        await until(engine.entered.is_set)
        rest = [asking(batcher, i) for i in range(2, 6)]
        await until(lambda: recorder.waiting == 4)
        engine.leave.set()
        assert await asyncio.gather(first, *rest) == [[-i] for i in range(1, 6)]
        assert [rows for rows, _ in recorder.batches] == [1, 4]


async def test_rows_of_different_keys_never_share_a_forward():
    async with batching() as (batcher, recorder):
        batcher.hold()
        asked = [asking(batcher, i, key="ab"[i % 2]) for i in range(6)]
        await until(lambda: recorder.waiting == 6)
        batcher.release()
        assert await asyncio.gather(*asked) == [[-i] for i in range(6)]
        assert [rows for rows, _ in recorder.batches] == [3, 3]


async def test_an_answer_tells_its_wait_in_steps_finer_than_the_event_loops_clock():
    async with batching() as (batcher, _):
        answers = [(await batcher.submit([work(batcher, i)]))[0] for i in range(50)]
        assert all(0 < answer.queue_ns < 1e9 for answer in answers)
        assert len({answer.queue_ns for answer in answers}) > 10
        assert any(answer.queue_ns % 1_000_000 for answer in answers)


async def test_two_instances_run_at_the_same_time_and_one_does_not():
    meeting = threading.Barrier(2)

    def together(works: Sequence[Work]) -> list[Rows]:
        meeting.wait(10)
        return negate(works)

    async with batching(together, together, max_batch=1) as (batcher, _):
        assert await asyncio.gather(ask(batcher, 1), ask(batcher, 2)) == [[-1], [-2]]
        assert batcher.instances == 2
    engine = Held()
    async with batching(engine, max_batch=1) as (batcher, recorder):
        asked = [asking(batcher, i) for i in range(2)]
        await until(engine.entered.is_set)
        assert recorder.waiting == 1
        engine.leave.set()
        assert await asyncio.gather(*asked) == [[0], [-1]]


async def test_a_full_queue_refuses_exactly_the_overflow_at_once():
    engine = Held()
    async with batching(engine, max_batch=1, queue_rows=4) as (batcher, recorder):
        running = asking(batcher, 9)
        await until(engine.entered.is_set)
        burst = [asking(batcher, i) for i in range(20)]
        await until(lambda: recorder.rejections["queue_full"] == 16)
        assert not running.done()
        engine.leave.set()
        ended = await asyncio.gather(*burst, return_exceptions=True)
        assert ended[:4] == [[-i] for i in range(4)]
        for error in ended[4:]:
            assert isinstance(error, Unavailable)
            assert "4 of 4 rows wait, 1 more came" in error.message
            assert error.retry_after
        assert await running == [-9]
        assert recorder.waiting == 0


async def test_a_queue_is_full_by_bytes_too():
    async with batching(queue_bytes=16) as (batcher, recorder):
        batcher.hold()
        kept = asking(batcher, 1, 2, 3)
        await until(lambda: recorder.bytes == 12)
        with pytest.raises(Unavailable, match="12 of 16 bytes wait, 8 more came"):
            await ask(batcher, 4, 5)
        last = asking(batcher, 6)
        await until(lambda: recorder.bytes == 16)
        with pytest.raises(InvalidArgument, match="the inputs take 20 bytes, the queue holds 16"):
            await ask(batcher, 1, 2, 3, 4, 5)
        batcher.release()
        assert await asyncio.gather(kept, last) == [[-1, -2, -3], [-6]]
        assert recorder.bytes == 0
        assert recorder.rejections == {"queue_full": 1, "too_large": 1}


async def test_a_request_of_several_works_is_admitted_whole_or_not_at_all():
    async with batching(queue_rows=4) as (batcher, recorder):
        batcher.hold()
        kept = asking(batcher, 1, 2)
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


async def test_the_padding_that_joining_lengths_adds_is_counted():
    async with batching() as (batcher, recorder):
        batcher.hold()
        works = [work(batcher, *([1.0] * rows)) for rows in (1, 2, 1)]
        for one, length in zip(works, (7, 12, 16), strict=True):
            one.length = length
        asked = [asyncio.create_task(batcher.submit([one])) for one in works]
        await until(lambda: recorder.waiting == 4)
        batcher.release()
        await asyncio.gather(*asked)
        (execution,) = recorder.executions
        assert (execution.tokens, execution.padding) == (7 + 2 * 12 + 16, 9 + 2 * 4)
