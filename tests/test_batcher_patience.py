"""Rows that a front end hands over together: whether they wait one more pass of the event loop for others."""

import asyncio
from collections.abc import Sequence

from batching import asking, batching, negate

from layercast.server.batching import batcher as batcher_module
from layercast.server.inline import up_to
from layercast.server.work import Rows, Work


class Noted:
    """An engine that notes how many works it runs."""

    def __init__(self) -> None:
        self.ran: list[int] = []

    def __call__(self, works: Sequence[Work]) -> list[Rows]:
        self.ran.append(len(works))
        return negate(works)


async def together(batcher, requests: int) -> None:
    """Let so many requests come in the same pass of the loop, and wait for all."""
    await asyncio.gather(*(asking(batcher, value) for value in range(requests)))


async def in_three_passes(batcher) -> None:
    """Let three requests come, each a pass of the loop after the one before, and wait for all."""
    asked = []
    for value in range(3):
        asked.append(asking(batcher, value))
        await asyncio.sleep(0)
    assert await asyncio.gather(*asked) == [[0], [-1], [-2]]


async def test_rows_that_come_together_wait_one_pass_for_others_where_batches_were_of_several_requests():
    engine = Noted()
    async with batching(engine, inline=up_to(8), together=True) as (batcher, _):
        for _ in range(8):
            await together(batcher, 3)
        engine.ran.clear()
        await in_three_passes(batcher)
        assert engine.ran == [2, 1]


async def test_rows_that_come_together_wait_for_nobody_where_batches_were_of_one_request():
    engine = Noted()
    async with batching(engine, inline=up_to(8), together=True) as (batcher, _):
        await in_three_passes(batcher)
        assert engine.ran == [1, 1, 1]


async def test_rows_that_wait_for_others_and_let_other_models_go_first_do_each_once():
    engine = Noted()
    async with batching(engine, inline=up_to(1, 8), together=True) as (batcher, _):
        for _ in range(8):
            await together(batcher, 3)
        engine.ran.clear()
        asked = [asking(batcher, value) for value in range(3)]
        passes = 0
        while not engine.ran:
            await asyncio.sleep(0)
            passes += 1
        assert await asyncio.gather(*asked) == [[0], [-1], [-2]]
        assert passes == 1 + 1 + batcher_module._PASSES + 1  # to be queued, for others, for other models, to run


async def test_a_full_batch_waits_for_nobody():
    engine = Noted()
    async with batching(engine, max_batch=2, inline=up_to(8), together=True) as (batcher, _):
        for _ in range(8):
            await together(batcher, 2)
        engine.ran.clear()
        asked = [asking(batcher, 1), asking(batcher, 2)]
        await asyncio.sleep(0)  # both are queued
        await asyncio.sleep(0)  # and looked at
        assert engine.ran == [2]
        assert await asyncio.gather(*asked) == [[-1], [-2]]
