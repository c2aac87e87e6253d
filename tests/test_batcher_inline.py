"""Forwards on the event loop: which batches run there, that rows of several passes share one, and what sends them off."""

import asyncio
import threading
import time
from collections.abc import Sequence
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from batching import ask, asking, batching, negate, picky, work

from layercast.server.batching import forwards, patience
from layercast.server.inline import Inline, up_to
from layercast.server.work import Rows, Tap, Work


@pytest.fixture(autouse=True)
def in_bunches(request, monkeypatch):
    """Take requests to come in bunches, unless the test says to look."""
    if "as_measured" not in request.fixturenames:
        monkeypatch.setattr(patience, "_BUNCH", 0)


@pytest.fixture
def as_measured() -> None:
    """Judge by how requests come."""


class Where:
    """An engine that notes which thread ran how many works, and takes `seconds`."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.ran: list[tuple[bool, int]] = []
        self.seconds = seconds

    def __call__(self, works: Sequence[Work]) -> list[Rows]:
        time.sleep(self.seconds)
        self.ran.append((threading.current_thread() is threading.main_thread(), len(works)))
        return negate(works)


async def test_small_batches_run_on_the_loop_and_larger_ones_in_the_thread():
    engine = Where()
    async with batching(engine, inline=up_to(2)) as (batcher, recorder):
        assert await ask(batcher, 1) == [-1]
        assert await ask(batcher, 1, 2) == [-1, -2]
        assert await ask(batcher, 1, 2, 3) == [-1, -2, -3]
        assert engine.ran == [(True, 1), (True, 1), (False, 1)]
        assert recorder.batches == [(1, "idle"), (2, "idle"), (3, "idle")]


async def test_more_rows_run_on_the_loop_when_they_are_requests_of_one_row():
    engine = Where()
    async with batching(engine, inline=up_to(2, 4)) as (batcher, _):
        await asyncio.gather(*(asking(batcher, value) for value in range(4)))
        assert await ask(batcher, 1, 2, 3, 4) == [-1, -2, -3, -4]
        await asyncio.gather(*(asking(batcher, value) for value in range(5)))
        assert engine.ran == [(True, 4), (False, 1), (False, 5)]


BY_LENGTH = Inline((*up_to(2, 4).rows, *up_to(1, 2).rows), (16, 32))


@pytest.mark.parametrize(
    ("lengths", "here"),
    [
        ([16] * 4, True), ([17] * 2, True), ([32, 8], True), ([33], False), ([16] * 5, False), ([8, 8, 17], False),
    ],
)  # fmt: skip
async def test_the_longest_of_a_batch_says_how_many_run_on_the_loop(lengths, here):
    engine = Where()
    async with batching(engine, inline=BY_LENGTH) as (batcher, _):
        works = [work(batcher, value) for value in range(len(lengths))]
        for one, length in zip(works, lengths, strict=True):
            one.length = length
        await asyncio.gather(*(batcher.submit([one]) for one in works))
        assert engine.ran == [(here, len(lengths))]


async def test_more_requests_of_one_row_than_the_loop_may_wait_for_run_in_the_thread_all_together():
    engine = Where()
    async with batching(engine, max_batch=64, inline=up_to(1, 16), together=True) as (batcher, _):
        assert await asyncio.gather(*(asking(batcher, value) for value in range(40))) == [[-v] for v in range(40)]
        await asyncio.gather(*(asking(batcher, value) for value in range(16)))
        assert engine.ran == [(False, 40), (True, 16)]


@pytest.mark.parametrize(("rows", "here"), [((32,) * 4, True), ((32,) * 3, True), ((64, 64), False), ((96,), False)])
async def test_the_more_requests_a_batch_is_of_the_longer_the_loop_may_wait_for_it(rows, here):
    engine, inline = Where(), Inline((((64, 0), (128, 4)),))
    async with batching(engine, max_batch=128, queue_rows=128, inline=inline) as (batcher, _):
        await asyncio.gather(*(ask(batcher, *range(many)) for many in rows))
        assert engine.ran == [(here, len(rows))]


async def test_a_model_with_less_to_do_runs_before_a_batch_that_takes_longer():
    order: list[str] = []

    def noted(name: str):
        def run(works: Sequence[Work]) -> list[Rows]:
            order.append(name)
            return negate(works)

        return run

    async with (
        batching(noted("long"), inline=up_to(1, 8), together=True) as (long, _),
        batching(noted("short"), inline=up_to(1, 8), together=True) as (short, _),
    ):
        many = [asking(long, value) for value in range(4)]
        await asyncio.sleep(0)
        assert long.queued_rows == 4
        await asyncio.gather(*many, asking(short, 1))
        assert order == ["short", "long"]


async def test_without_limits_for_it_nothing_runs_on_the_loop():
    engine = Where()
    async with batching(engine) as (batcher, _):
        await ask(batcher, 1)
        assert engine.ran == [(False, 1)]


async def test_a_batch_with_taps_runs_in_the_thread():
    def tapped(works: Sequence[Work]) -> list[Rows]:
        ran.append(threading.current_thread() is threading.main_thread())
        return negate(works)

    ran: list[bool] = []
    async with batching(tapped, inline=up_to(8)) as (batcher, _):
        one = work(batcher, 1)
        one.taps = (Tap("a"),)
        await batcher.submit([one])
        assert ran == [False]


async def test_requests_of_several_passes_of_the_loop_share_a_forward():
    engine = Where()
    async with batching(engine, inline=up_to(8)) as (batcher, _):
        asked = []
        for value in range(4):
            asked.append(asking(batcher, value))
            await asyncio.sleep(0)
        assert await asyncio.gather(*asked) == [[-value] for value in range(4)]
        assert engine.ran == [(True, 4)]


async def test_a_batch_on_the_loop_that_fails_is_run_again_one_by_one_in_the_thread():
    async with batching(picky, inline=up_to(8)) as (batcher, _):
        batcher.hold()
        asked = [asking(batcher, value) for value in (1, -1, 2)]
        await asyncio.sleep(0)
        batcher.release()
        first, failed, last = await asyncio.gather(*asked, return_exceptions=True)
        assert (first, last) == ([-1], [-2])
        assert isinstance(failed, ValueError)
        with pytest.raises(ValueError, match="negative"):
            await ask(batcher, -3)
        assert await ask(batcher, 5) == [-5]


async def test_a_model_that_is_slower_than_at_its_load_leaves_the_loop_for_a_while(monkeypatch):
    monkeypatch.setattr(forwards, "_WARY_NS", 50_000_000)
    engine = Where(seconds=0.004)
    async with batching(engine, inline=up_to(8)) as (batcher, _):
        for value in range(4):
            await ask(batcher, value)
        assert engine.ran == [(True, 1)] * 3 + [(False, 1)]
        await asyncio.sleep(0.06)
        await ask(batcher, 5)
        assert engine.ran[-1] == (True, 1)


@pytest.fixture
def clock(monkeypatch) -> list[int]:
    """The time by which forwards are judged, in nanoseconds: the tests' own."""
    now = [10**9]
    monkeypatch.setattr(forwards, "time", SimpleNamespace(perf_counter_ns=lambda: now[0]))
    return now


async def inline_of(clock: list[int], milliseconds: Sequence[int], fails: bool = False) -> list[bool]:
    """Run forwards that take so long, one after the other; tell which of them ran on the loop."""
    ran: list[bool] = []

    def engine(works: Sequence[Work]) -> list[Rows]:
        clock[0] += milliseconds[len(ran)] * 1_000_000
        ran.append(threading.current_thread() is threading.main_thread())
        return picky(works)

    async with batching(engine, inline=up_to(8)) as (batcher, _):
        for _ in milliseconds:
            with pytest.raises(ValueError, match="negative") if fails else nullcontext():
                await ask(batcher, -1 if fails else 1)
    return ran


async def test_a_model_that_is_slow_now_and_then_leaves_the_loop_as_well(clock):
    assert await inline_of(clock, [4, 0, 4, 0, 0, 4, 0]) == [True] * 6 + [False]


async def test_slow_forwards_that_are_far_apart_are_the_machines(clock):
    assert all(await inline_of(clock, [4, *[0] * 15, 4, *[0] * 15, 4, 0]))


async def test_one_forward_that_keeps_the_loop_for_long_is_enough(clock):
    assert await inline_of(clock, [0, 21, 0]) == [True, True, False]


async def test_a_forward_that_fails_after_a_while_counts_as_well(clock):
    assert await inline_of(clock, [21, 0], fails=True) == [True, False]


async def test_more_requests_may_take_longer(clock):
    def engine(works: Sequence[Work]) -> list[Rows]:
        clock[0] += 4_000_000
        ran.append(threading.current_thread() is threading.main_thread())
        return negate(works)

    ran: list[bool] = []
    async with batching(engine, inline=up_to(8)) as (batcher, _):
        for _ in range(4):
            await asyncio.gather(*(asking(batcher, value) for value in range(8)))
    assert ran == [True] * 4


async def test_a_batcher_that_runs_on_the_loop_drains_and_closes():
    async with batching(inline=up_to(8)) as (batcher, recorder):
        asked = [asking(batcher, value) for value in range(3)]
        await asyncio.sleep(0)
        assert await batcher.drain(5)
        assert await asyncio.gather(*asked) == [[0], [-1], [-2]]
        assert recorder.waiting == 0


async def together(batcher, requests: int) -> None:
    """Let so many requests come in the same pass of the loop, and wait for all."""
    await asyncio.gather(*(batcher.submit([work(batcher, 1)]) for _ in range(requests)))


@pytest.mark.usefixtures("as_measured")
async def test_requests_that_come_one_by_one_are_run_in_the_thread():
    engine = Where()
    async with batching(engine, inline=up_to(8)) as (batcher, _):
        for _ in range(20):
            await together(batcher, 1)
        assert engine.ran == [(False, 1)] * 20


@pytest.mark.usefixtures("as_measured")
async def test_requests_that_come_in_bunches_are_run_on_the_loop_until_they_no_longer_do():
    engine = Where()
    async with batching(engine, inline=up_to(8)) as (batcher, _):
        for _ in range(16):
            await together(batcher, 3)
        assert (engine.ran[0], engine.ran[-1]) == ((False, 3), (True, 3))
        for _ in range(40):
            await together(batcher, 1)
        assert engine.ran[-1] == (False, 1)
