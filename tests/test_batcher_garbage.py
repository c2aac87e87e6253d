"""Requests leave no circles of references behind: a garbage collection, which stops the server, has nothing to find."""

import asyncio
import gc
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from batching import ask, batching, negate, until, work

from layercast.server.batching.batcher import Batcher
from layercast.server.errors import DeadlineExceeded, Unavailable
from layercast.server.inline import up_to

MANY = 50


@contextmanager
def no_collections() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


async def answered(batcher: Batcher) -> None:
    assert await ask(batcher, 1) == [-1]


async def split(batcher: Batcher) -> None:
    await batcher.submit([work(batcher, 1), work(batcher, 2)])


async def timed_out(batcher: Batcher) -> None:
    with pytest.raises(Unavailable):
        await ask(batcher, 1, timeout=0.0)


async def late(batcher: Batcher) -> None:
    with pytest.raises(DeadlineExceeded):
        await ask(batcher, 1, deadline=asyncio.get_running_loop().time() + 0.0005)


async def cancelled(batcher: Batcher) -> None:
    task = asyncio.ensure_future(ask(batcher, 1))
    await until(lambda: batcher.queued_rows > 0)
    task.cancel()
    await asyncio.wait([task])


@pytest.mark.parametrize(
    ("end", "held"), [(answered, False), (split, False), (timed_out, True), (late, True), (cancelled, True)]
)
@pytest.mark.parametrize("inline_rows", [0, 8])
async def test_a_request_leaves_nothing_for_the_garbage_collection(
    end: Callable[[Batcher], Awaitable[Any]], held: bool, inline_rows: int
):
    async with batching(negate, inline=up_to(inline_rows)) as (batcher, _):
        if held:
            batcher.hold()
        await end(batcher)
        with no_collections():
            for _ in range(MANY):
                await end(batcher)
            assert gc.collect() < MANY
        batcher.release()
