"""Batches beside which nothing of their model runs: they have an instance of their own, with all processors."""

import asyncio

import pytest
from batching import Held, ask, batching, picky, work


async def entered(*engines: Held) -> None:
    for engine in engines:
        assert await asyncio.to_thread(engine.entered.wait, 10)


@pytest.fixture
def engines() -> tuple[Held, Held, Held]:
    """Two instances, and the one for lone batches."""
    return Held(), Held(), Held()


async def test_a_lone_batch_runs_on_all_processors_and_those_beside_it_on_their_own(engines):
    one, two, alone = engines
    async with batching(one, two, alone=alone) as (batcher, _):
        assert batcher.instances == 2
        calls = [asyncio.ensure_future(ask(batcher, 1))]
        await entered(alone)
        calls.append(asyncio.ensure_future(ask(batcher, 2)))
        await entered(two)
        # Two run, and no more than that at the same time: what comes now waits for one of them.
        calls.append(asyncio.ensure_future(ask(batcher, 3)))
        await asyncio.sleep(0)
        assert batcher.queued_rows == 1
        alone.leave.set()
        assert await calls[0] == [-1]
        await entered(one)  # beside the second, so not alone
        for engine in (one, two):
            engine.leave.set()
        assert [await call for call in calls] == [[-1], [-2], [-3]]
        assert await ask(batcher, 4) == [-4]
    assert (one.ran, two.ran, alone.ran) == ([[3]], [[2]], [[1], [4]])


async def test_what_comes_together_is_shared_out_and_none_of_it_is_alone(engines):
    one, two, alone = engines
    async with batching(one, two, alone=alone) as (batcher, _):
        batcher.hold()
        calls = [asyncio.ensure_future(ask(batcher, value)) for value in (1, 2)]
        await asyncio.sleep(0)
        batcher.release()
        await entered(one, two)
        for engine in (one, two):
            engine.leave.set()
        assert [await call for call in calls] == [[-1], [-2]]
    assert (sorted(one.ran + two.ran), alone.ran) == ([[1], [2]], [])


async def test_rows_of_one_request_run_together_alone(engines):
    one, two, alone = engines
    alone.leave.set()
    async with batching(one, two, alone=alone) as (batcher, recorder):
        assert await ask(batcher, 1, 2, 3, 4) == [-1, -2, -3, -4]
        assert recorder.batches == [(4, "idle")]
    assert (one.ran, two.ran, alone.ran) == ([], [], [[1, 2, 3, 4]])


async def test_the_culprit_of_a_lone_batch_fails_and_the_others_run_again_on_an_instance(engines):
    one, two, alone = Held(picky), Held(picky), Held(picky)
    for engine in (one, two, alone):
        engine.leave.set()
    async with batching(one, two, alone=alone, preferred=(3,)) as (batcher, _):  # which are not shared out
        batcher.hold()
        calls = [asyncio.ensure_future(ask(batcher, value)) for value in (1, -2, 3)]
        await asyncio.sleep(0)
        batcher.release()
        found = await asyncio.gather(*calls, return_exceptions=True)
        assert (found[0], found[2]) == ([-1], [-3])
        assert isinstance(found[1], ValueError)
        assert await ask(batcher, 4) == [-4]
    assert (one.ran + two.ran, alone.ran) == ([[1], [-2], [3]], [[1, -2, 3], [4]])


async def test_a_batcher_that_closes_waits_for_a_lone_batch(engines):
    one, two, alone = engines
    async with batching(one, two, alone=alone) as (batcher, _):
        call = asyncio.ensure_future(batcher.submit([work(batcher, 1)]))
        await entered(alone)
        closing = asyncio.ensure_future(batcher.close())
        await asyncio.sleep(0)
        assert not closing.done()
        alone.leave.set()
        (answer,) = await call
        assert answer.outputs["y"].tolist() == [[-1]]
        await closing
