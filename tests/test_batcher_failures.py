"""Models that raise, lose rows or do worse: only the culprit's caller is told, and the next batch is fine."""

import asyncio
from collections.abc import Sequence

import pytest
from batching import Held, ask, asking, batching, negate, picky, until, work

from layercast.server.errors import ModelFailed
from layercast.server.work import Answer, Rows, Work


async def test_a_poisoned_row_fails_alone_and_the_rest_is_counted_as_it_ran():
    async with batching(picky) as (batcher, recorder):
        batcher.hold()
        works = [work(batcher, -9 if i == 3 else i) for i in range(8)]
        asked = [asyncio.create_task(batcher.submit([one])) for one in works]
        await until(lambda: recorder.waiting == 8)
        batcher.release()
        results = await asyncio.gather(*asked, return_exceptions=True)
        assert isinstance(results.pop(3), ValueError)
        answers: list[Answer] = [answer for (answer,) in results]
        assert [float(a.outputs["y"][0, 0]) for a in answers] == [-i for i in range(8) if i != 3]
        assert [a.batch_rows for a in answers] == [1] * 7
        assert [a.compute_ns for a in answers] == [e.compute_ns for e in recorder.executions]
        assert recorder.batches == [(1, "full")] * 7
        assert await ask(batcher, 5) == [-5]


async def test_after_a_failure_nothing_runs_again_for_a_caller_who_left():
    engine = Held(picky)
    async with batching(engine) as (batcher, recorder):
        batcher.hold()
        poisoned, gone, kept = asking(batcher, -1), asking(batcher, 2), asking(batcher, 3)
        await until(lambda: recorder.waiting == 3)
        batcher.release()
        await until(engine.entered.is_set)
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        engine.leave.set()
        assert await kept == [-3]
        with pytest.raises(ValueError, match="negative"):
            await poisoned
        assert engine.ran == [[-1, 2, 3], [-1], [3]]


async def test_a_run_that_loses_a_result_fails_every_work_is_not_tried_again_and_the_next_batch_is_fine():
    calls = []

    def forgetful(works: Sequence[Work]) -> list[Rows]:
        calls.append(len(works))
        return negate(works)[: -1 if len(calls) == 1 else None]

    async with batching(forgetful) as (batcher, recorder):
        batcher.hold()
        asked = [asking(batcher, i) for i in range(3)]
        await until(lambda: recorder.waiting == 3)
        batcher.release()
        results = await asyncio.gather(*asked, return_exceptions=True)
        assert [type(result) for result in results] == [ModelFailed] * 3
        assert "3 works ran and 2 results came back" in str(results[0])
        assert calls == [3]
        assert recorder.batches == []
        assert await ask(batcher, 2) == [-2]


@pytest.mark.parametrize("error", [StopIteration, asyncio.CancelledError, TimeoutError, SystemExit, KeyboardInterrupt])
async def test_an_exception_that_means_something_to_others_is_the_models_own(error):
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


async def test_one_failed_part_ends_the_request_and_takes_its_other_parts_out_of_the_queue():
    async with batching(picky, max_batch=1) as (batcher, recorder):
        batcher.hold()
        asked = asyncio.create_task(batcher.submit([work(batcher, -1), work(batcher, 2), work(batcher, 3)]))
        await until(lambda: recorder.waiting == 3)
        batcher.release()
        with pytest.raises(ValueError, match="negative"):
            await asked
        assert batcher.queued_rows == 0
        assert await ask(batcher, 4) == [-4]


async def test_a_later_part_that_fails_first_ends_the_request_at_once():
    engine = Held()
    async with batching(engine, picky, max_batch=1) as (batcher, _), asyncio.timeout(10):
        with pytest.raises(ValueError, match="negative"):
            await batcher.submit([work(batcher, 1), work(batcher, -2)])
        await until(engine.entered.is_set)
        assert engine.ran == [[1]]


async def test_a_fault_of_the_batchers_own_ends_the_batch_and_not_the_batcher():
    async with batching() as (batcher, recorder):
        executed, recorder.executed = recorder.executed, None
        with pytest.raises(TypeError):
            await ask(batcher, 1)
        recorder.executed = executed
        assert await ask(batcher, 2) == [-2]
