"""How requests share a model: preferred sizes as in Triton, priorities, and even shares between peers."""

import asyncio
from collections.abc import Sequence

import pytest
from batching import LONG, Held, ask, asking, batching, negate, until

from layercast.server.errors import Evicted, Unavailable
from layercast.server.work import Rows, Work

# Sizes of requests that wait, and the batches that leave at once; preferred sizes 2 and 6, at most 8 rows, and a delay
# that never ends. From Triton's L0_batcher.
PREFERRED = {
    "one row waits": ([1], [], 1),
    "a preferred size leaves": ([2], [(2, "preferred")], 0),
    "neither of two sizes": ([1, 3], [], 4),
    "two make a preferred size": ([1, 1], [(2, "preferred")], 0),
    "the largest preferred size": ([1] * 6, [(6, "preferred")], 0),
    "the largest, the rest waits": ([1] * 7, [(6, "preferred")], 1),
    "a smaller one, the rest waits": ([2, 3], [(2, "preferred")], 3),
    "more than the largest": ([3, 4], [(7, "full")], 0),
    "no room for the next": ([3, 7], [(3, "full"), (7, "full")], 0),
    "no room for the next, which waits": ([5, 4], [(5, "full")], 4),
    "a whole batch": ([8], [(8, "full")], 0),
    "one after the other": ([2, 2, 2, 2, 2], [(6, "preferred"), (2, "preferred"), (2, "preferred")], 0),
}


@pytest.mark.parametrize("name", PREFERRED)
async def test_a_batch_of_a_preferred_size_leaves_and_what_is_left_waits(name):
    sizes, batches, left = PREFERRED[name]
    async with batching(max_batch=8, delay=LONG, preferred=(2, 6)) as (batcher, recorder):
        batcher.hold()
        asked = [asking(batcher, *range(size)) for size in sizes]
        await until(lambda: recorder.waiting == sum(sizes))
        batcher.release()
        await until(lambda: len(recorder.batches) >= len(batches))
        assert recorder.batches == batches
        assert batcher.queued_rows == left
        await batcher.drain()
        assert await asyncio.gather(*asked) == [[-float(i) for i in range(size)] for size in sizes]


async def test_without_a_delay_a_size_that_is_not_preferred_runs_too():
    async with batching(preferred=(4,)) as (batcher, recorder):
        batcher.hold()
        asked = [asking(batcher, i) for i in range(5)]
        await until(lambda: recorder.waiting == 5)
        batcher.release()
        assert await asyncio.gather(*asked) == [[-i] for i in range(5)]
        assert recorder.batches == [(4, "preferred"), (1, "idle")]


async def test_the_highest_priority_runs_first_and_zero_or_an_unknown_level_is_the_last():
    engine = Held()
    async with batching(engine, max_batch=1, priorities=3) as (batcher, recorder):
        first = asking(batcher, 99)
        await until(engine.entered.is_set)
        asked = []
        for priority in (0, 3, 2, 7, 1, 2, 1):
            asked.append(asking(batcher, 10 * priority + len(asked), priority=priority))
            await until(lambda: recorder.waiting == len(asked))
        engine.leave.set()
        await asyncio.gather(first, *asked)
        assert engine.ran == [[99], [14], [16], [22], [25], [0], [31], [73]]


async def test_rows_of_lower_priority_fill_the_batch_of_higher_ones():
    async with batching(max_batch=4, priorities=2) as (batcher, recorder):
        batcher.hold()
        asked = [asking(batcher, i, priority=2 - i % 2) for i in range(4)]
        await until(lambda: recorder.waiting == 4)
        batcher.release()
        assert await asyncio.gather(*asked) == [[-i] for i in range(4)]
        assert recorder.batches == [(4, "full")]


async def test_a_peer_with_one_row_does_not_wait_for_another_with_a_hundred():
    engine = Held()
    async with batching(engine, max_batch=4, queue_rows=1000) as (batcher, recorder):
        first = asking(batcher, 999)
        await until(engine.entered.is_set)
        greedy = [asking(batcher, i, peer="greedy") for i in range(100)]
        await until(lambda: recorder.waiting == 100)
        small = asking(batcher, 500, peer="small")
        await until(lambda: recorder.waiting == 101)
        engine.leave.set()
        await asyncio.gather(first, small, *greedy)
        assert 500 in engine.ran[1]
        assert engine.ran[1:3] == [[0, 500, 1, 2], [3, 4, 5, 6]]


async def test_a_full_queue_still_takes_a_peer_that_holds_less_than_its_share():
    async with batching(queue_rows=10) as (batcher, recorder):
        batcher.hold()
        greedy = [asking(batcher, i, peer="greedy") for i in range(10)]
        await until(lambda: recorder.waiting == 10)
        with pytest.raises(Unavailable, match="10 of 10 rows wait"):
            await ask(batcher, 10, peer="greedy")
        small = [asking(batcher, 100 + i, peer="small") for i in range(6)]
        refused = await asyncio.gather(*greedy[5:], small[5], return_exceptions=True)
        assert [type(error) for error in refused] == [Evicted] * 5 + [Unavailable]
        assert ["made room for another's" in error.message for error in refused] == [True] * 5 + [False]
        assert all(error.retry_after for error in refused)
        assert recorder.waiting == 10
        batcher.release()
        assert await asyncio.gather(*greedy[:5]) == [[-i] for i in range(5)]
        assert await asyncio.gather(*small[:5]) == [[-100 - i] for i in range(5)]
        assert recorder.rejections == {"queue_full": 7}


async def test_shares_hold_for_bytes_too_and_nobody_is_turned_out_for_a_request_that_is_refused():
    async with batching(queue_bytes=40) as (batcher, recorder):
        batcher.hold()
        greedy = [asking(batcher, i, i, peer="greedy") for i in range(5)]
        await until(lambda: recorder.bytes == 40)
        with pytest.raises(Unavailable, match="40 of 40 bytes wait, 24 more came"):
            await ask(batcher, *range(6), peer="small")
        assert recorder.bytes == 40
        small = asking(batcher, *range(3), peer="small")
        ended = await asyncio.gather(*greedy[3:], return_exceptions=True)
        assert [type(error) for error in ended] == [Evicted] * 2
        batcher.release()
        assert await asyncio.gather(small, *greedy[:3]) == [[0, -1, -2], [0, 0], [-1, -1], [-2, -2]]


async def test_at_ten_times_the_capacity_every_batch_is_full_and_what_is_accepted_is_answered():
    """While each batch of 8 runs, 80 more rows come: 8 find room, the others are refused before the batch has ended."""
    steps: asyncio.Queue[None] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def paced(works: Sequence[Work]) -> list[Rows]:
        asyncio.run_coroutine_threadsafe(steps.get(), loop).result(30)
        return negate(works)

    asked: list[asyncio.Task[list[float]]] = []
    async with batching(paced, queue_rows=16) as (batcher, recorder):
        for number in range(3):
            asked += [asking(batcher, i) for i in range(8)]
            await until(lambda wanted=8 * number: recorder.waiting == wanted)
        for ran in range(1, 11):
            asked += [asking(batcher, 100 * ran + i, peer=str(i % 5)) for i in range(80)]
            await until(lambda wanted=72 * ran + 8: recorder.rejections["queue_full"] == wanted)
            assert len(recorder.executions) == ran - 1
            steps.put_nowait(None)
            await until(lambda wanted=ran: len(recorder.executions) == wanted and recorder.waiting == 8)
        steps.put_nowait(None)
        steps.put_nowait(None)
        ended = await asyncio.gather(*asked, return_exceptions=True)
    assert recorder.batches == [(8, "full")] * 12
    assert sum(isinstance(end, list) for end in ended) == 96
    assert sum(isinstance(end, Unavailable) for end in ended) == len(ended) - 96
