"""How waiting and running ends otherwise than with an answer: deadlines, queue timeouts, cancels, drains, stops."""

import asyncio
import time
from collections.abc import Sequence

import pytest
from batching import LONG, Held, ask, asking, batching, negate, until, work

from layercast.server.batching.pace import Pace
from layercast.server.errors import DeadlineExceeded, Unavailable
from layercast.server.work import Course, Rows, Terms, Work


def soon(seconds: float) -> float:
    return asyncio.get_running_loop().time() + seconds


async def test_a_cancelled_row_leaves_the_queue_and_never_runs():
    async with batching() as (batcher, recorder):
        batcher.hold()
        kept, gone = asking(batcher, 1), asking(batcher, 2)
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
    engine = Held()
    async with batching(engine) as (batcher, recorder):
        batcher.hold()
        kept, gone = asking(batcher, 1), asking(batcher, 2)
        await until(lambda: recorder.waiting == 2)
        batcher.release()
        await until(engine.entered.is_set)
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        engine.leave.set()
        assert await kept == [-1]
        assert recorder.cancels == {"running": 1}
        assert await ask(batcher, 3) == [-3]


async def test_a_passed_deadline_is_told_at_once_and_the_row_never_runs():
    async with batching() as (batcher, recorder):
        batcher.hold()
        kept = asking(batcher, 1)
        await until(lambda: recorder.waiting == 1)
        with pytest.raises(DeadlineExceeded):
            await ask(batcher, 2, deadline=soon(0.01))
        assert batcher.queued_rows == 1
        assert recorder.expiries == {"queued": 1}
        batcher.release()
        assert await kept == [-1]
        assert recorder.batches == [(1, "idle")]


async def test_a_deadline_that_has_passed_on_arrival_takes_no_place_in_the_queue():
    async with batching(queue_rows=1) as (batcher, recorder):
        batcher.hold()
        kept = asking(batcher, 1, peer="other")
        await until(lambda: recorder.waiting == 1)
        with pytest.raises(DeadlineExceeded):
            await ask(batcher, 2, deadline=soon(-0.01))
        assert recorder.expiries == {"queued": 1}
        assert recorder.rejections == {}
        batcher.release()
        assert await kept == [-1]
        assert recorder.batches == [(1, "idle")]


async def test_five_calls_that_expire_behind_one_that_runs_are_five_deadlines_and_one_execution():
    engine = Held()
    async with batching(engine) as (batcher, recorder):
        running = asking(batcher, 1)
        await until(engine.entered.is_set)
        start = time.perf_counter()
        late = [asking(batcher, i, deadline=soon(0.05)) for i in range(2, 7)]
        ended = await asyncio.gather(*late, return_exceptions=True)
        assert all(isinstance(error, DeadlineExceeded) for error in ended)
        assert time.perf_counter() - start < 1
        assert not running.done()
        engine.leave.set()
        assert await running == [-1]
        await until(lambda: len(recorder.executions) == 1)
        assert engine.ran == [[1]]
        assert recorder.expiries == {"queued": 5}


async def test_no_forward_is_spent_on_a_deadline_that_it_is_sure_to_miss():
    calls = []

    def slow(works: Sequence[Work]) -> list[Rows]:
        calls.append(len(works))
        time.sleep(0.4)
        return negate(works)

    async with batching(slow) as (batcher, recorder):
        with pytest.raises(DeadlineExceeded):
            await ask(batcher, 1, deadline=soon(0.1))  # how long it takes is not known yet
        await until(lambda: recorder.executions != [])
        for _ in range(3):
            with pytest.raises(DeadlineExceeded):
                await ask(batcher, 2, deadline=soon(0.1))
        assert calls == [1]
        assert recorder.expiries == {"running": 1, "queued": 3}
        assert await ask(batcher, 3, deadline=soon(10)) == [-3]
        assert calls == [1, 1]


def test_a_slow_moment_refuses_nothing_for_good():
    pace, second = Pace(), 1_000_000_000
    assert pace.least("k", 4, 0) == 0
    pace.ran("k", 4, 600, now=0)
    pace.ran("k", 4, 400, now=10)
    pace.ran("k", 4, 800, now=20)
    assert [pace.least("k", rows, 30) for rows in (1, 4, 8)] == [50, 200, 200]
    assert pace.least("other", 4, 30) == 0
    assert pace.least("k", 4, 11 + second) == 0
    pace.ran("k", 1, 1000, now=11 + second)
    assert pace.least("k", 4, 12 + second) == 500


def test_a_lone_batch_may_have_the_processors_of_all_instances():
    pace = Pace(sharers=4)
    pace.ran("k", 4, 800, now=0)
    assert [pace.least("k", rows, 1) for rows in (1, 4)] == [25, 100]


async def test_a_deadline_that_passes_while_the_rows_run_is_told_apart():
    engine = Held()
    async with batching(engine) as (batcher, recorder):
        with pytest.raises(DeadlineExceeded):
            await ask(batcher, 1, deadline=soon(0.05))
        assert engine.ran == [[1]]
        assert recorder.expiries == {"running": 1}


@pytest.mark.parametrize(("left", "counted"), [(0.01, "expired"), (30.0, "cancelled")])
async def test_a_cancel_an_instant_before_the_deadline_is_the_deadlines(left, counted):
    async with batching() as (batcher, recorder):
        batcher.hold()
        gone = asking(batcher, 1, deadline=soon(left))
        await until(lambda: recorder.waiting == 1)
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        both = {"expired": recorder.expiries, "cancelled": recorder.cancels}
        assert both.pop(counted) == {"queued": 1}
        assert not any(both.popitem()[1].values())


async def test_the_queue_timeout_fires_at_its_own_time_while_another_batch_runs():
    engine = Held()
    async with batching(engine, queue_timeout=0.2) as (batcher, recorder):
        running = asking(batcher, 1)
        await until(engine.entered.is_set)
        start = time.perf_counter()
        with pytest.raises(Unavailable, match="Request timeout expired") as refused:
            await ask(batcher, 2)
        assert 0.18 < time.perf_counter() - start < 2
        assert refused.value.retry_after
        assert recorder.rejections == {"queue_timeout": 1}
        assert batcher.queued_rows == 0
        engine.leave.set()
        assert await running == [-1]  # what runs waits no more, however long it takes
        assert engine.ran == [[1]]
        batcher.hold()
        with pytest.raises(DeadlineExceeded):
            await ask(batcher, 3, deadline=soon(0.05))
        assert recorder.rejections == {"queue_timeout": 1}
        assert recorder.expiries == {"queued": 1}


@pytest.mark.parametrize(("own", "asked", "wanted"), [(None, 0.05, 50), (LONG, 0.05, 50), (0.05, LONG, 50)])
async def test_a_request_may_only_shorten_the_queue_timeout(own, asked, wanted):
    async with batching(queue_timeout=own) as (batcher, _):
        batcher.hold()
        with pytest.raises(Unavailable, match=f"waited {wanted} ms"):
            await ask(batcher, 1, timeout=asked)


async def test_a_split_request_times_out_whole_also_when_a_part_runs():
    engine = Held()
    async with batching(engine, max_batch=1) as (batcher, recorder), asyncio.timeout(10):
        with pytest.raises(Unavailable, match="Request timeout expired"):
            await batcher.submit([work(batcher, 1), work(batcher, 2), work(batcher, 3)], Terms(timeout=0.05))
        assert batcher.queued_rows == 0
        assert recorder.rejections == {"queue_timeout": 1}
        engine.leave.set()
        assert await ask(batcher, 4) == [-4]
        assert engine.ran == [[1], [4]]


async def test_draining_answers_what_was_admitted_and_refuses_the_rest():
    async with batching(delay=LONG) as (batcher, recorder):
        asked = [asking(batcher, i) for i in range(6)]
        await until(lambda: recorder.waiting == 6)
        async with asyncio.timeout(10):
            assert await batcher.drain()
        assert await asyncio.gather(*asked) == [[-i] for i in range(6)]
        assert recorder.batches == [(6, "drain")]
        with pytest.raises(Unavailable, match="shutting down"):
            await ask(batcher, 7)
        assert recorder.rejections == {"draining": 1}


async def test_draining_lets_later_parts_of_what_was_admitted_in_until_it_is_closed():
    async with batching() as (batcher, recorder), asyncio.timeout(10):
        batcher.hold()
        admitted, late = Course(), Course()
        first = asking(batcher, 1, course=admitted)
        await until(lambda: recorder.waiting == 1)
        assert await batcher.drain()
        assert await first == [-1]
        batcher.hold()
        second = asking(batcher, 2, course=admitted)
        await until(lambda: recorder.waiting == 1)
        with pytest.raises(Unavailable, match="shutting down"):
            await ask(batcher, 3, course=late)
        draining = asyncio.create_task(batcher.drain())  # which waits for the part, too
        assert await second == [-2]
        assert await draining
        await batcher.close()
        with pytest.raises(Unavailable, match="shutting down"):
            await ask(batcher, 4, course=admitted)
        assert recorder.rejections == {"draining": 2}


async def test_parts_of_one_request_count_its_end_once():
    async with batching() as (batcher, recorder), asyncio.timeout(10):
        batcher.hold()
        for end in ("late", "gone"):
            course = Course()
            deadline = asyncio.get_running_loop().time() + 0.02 if end == "late" else None
            parts = [asking(batcher, i, course=course, deadline=deadline) for i in (1, 2)]
            await until(lambda: recorder.waiting == 2)
            for part in parts if end == "gone" else ():
                part.cancel()
            await asyncio.gather(*parts, return_exceptions=True)
        assert (recorder.expiries, recorder.cancels) == ({"queued": 1}, {"queued": 1})


async def test_draining_ends_when_its_time_is_over():
    engine = Held()
    async with batching(engine) as (batcher, _):
        running = asking(batcher, 1)
        await until(engine.entered.is_set)
        async with asyncio.timeout(10):
            assert not await batcher.drain(0.05)
        assert not running.done()
        engine.leave.set()
        assert await batcher.drain()
        assert await running == [-1]


async def test_draining_waits_for_rows_that_run_for_nobody_and_for_no_row_that_left():
    async with batching(delay=LONG) as (batcher, recorder):
        batcher.hold()
        gone = asking(batcher, 1)
        await until(lambda: recorder.waiting == 1)
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        async with asyncio.timeout(10):
            assert await batcher.drain()
        assert recorder.batches == []


async def test_closing_answers_what_runs_and_fails_what_waits():
    engine = Held()
    async with batching(engine) as (batcher, recorder):
        running = asking(batcher, 1)
        await until(engine.entered.is_set)
        waiting = [asking(batcher, i) for i in (2, 3)]
        await until(lambda: recorder.waiting == 2)
        closing = asyncio.create_task(batcher.close())
        for task in waiting:
            with pytest.raises(Unavailable, match="stopped before the rows ran"):
                await task
        engine.leave.set()
        assert await running == [-1]
        await closing
        with pytest.raises(Unavailable):
            await ask(batcher, 4)
        assert engine.ran == [[1]]


async def test_closing_does_not_wait_for_ever_and_leaves_no_work_without_an_end():
    engine = Held()
    async with batching(engine) as (batcher, _):
        running = asking(batcher, 1)
        await until(engine.entered.is_set)
        async with asyncio.timeout(10):
            await batcher.close(0.05)
        with pytest.raises(Unavailable, match="stopped while the rows ran"):
            await running
