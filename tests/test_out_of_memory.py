"""Forwards for which memory is too small: halves of the batch run, and only the culprit's caller is told."""

import asyncio
import gc
import weakref
from collections.abc import Callable, Sequence

import grpc
import numpy as np
import pytest
import tiny
import torch
from batching import Held, ask, asking, batching, negate, until, work
from fake_card import FakeCard, use
from numeric import Model, asked, numeric
from test_server_inference import values_of

from layercast.server import memory
from layercast.server.engines import cuda
from layercast.server.errors import OutOfMemory
from layercast.server.loader import LoadError, load
from layercast.server.settings import ModelSettings
from layercast.server.work import Rows, Work


class Small:
    """Negates; has no memory for more than `room` rows, nor for any batch with a negative row."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.ran: list[list[int]] = []

    def __call__(self, works: Sequence[Work]) -> list[Rows]:
        values = [int(value) for work in works for value in work.inputs["x"][:, 0]]
        self.ran.append(values)
        if len(values) > self.room or min(values) < 0:
            raise OutOfMemory(f"no room for {values}")
        return negate(works)


async def together(batcher, recorder, *rows: Sequence[float]) -> list[list[float] | BaseException]:
    batcher.hold()
    waiting = [asking(batcher, *values) for values in rows]
    await until(lambda: recorder.waiting == sum(map(len, rows)))
    batcher.release()
    return await asyncio.gather(*waiting, return_exceptions=True)


async def test_a_batch_that_is_too_large_runs_in_halves():
    run = Small(room=2)
    async with batching(run) as (batcher, recorder):
        assert await together(batcher, recorder, *([value] for value in range(8))) == [[-v] for v in range(8)]
        assert run.ran == [[*range(8)], [0, 1, 2, 3], [0, 1], [2, 3], [4, 5, 6, 7], [4, 5], [6, 7]]
        assert recorder.batches == [(2, "full")] * 4
        assert await ask(batcher, 5) == [-5]


async def test_only_the_culprit_is_refused_and_whoever_ran_with_it_is_answered():
    run = Small(room=100)
    async with batching(run) as (batcher, recorder):
        *answers, error = await together(batcher, recorder, [1], [2], [3], [-4])
        assert answers == [[-1], [-2], [-3]]
        assert isinstance(error, OutOfMemory)
        assert str(error) == "no room for [-4]"
        assert error.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert run.ran == [[1, 2, 3, -4], [1, 2], [3, -4], [3], [-4]]


async def test_halves_have_about_as_many_rows():
    run = Small(room=4)
    async with batching(run) as (batcher, recorder):
        assert await together(batcher, recorder, [1, 1, 1, 1], [2], [3], [4, 4]) == [[-1] * 4, [-2], [-3], [-4] * 2]
        assert run.ran == [[1, 1, 1, 1, 2, 3, 4, 4], [1, 1, 1, 1], [2, 3, 4, 4]]


async def test_a_half_in_which_the_model_raises_finds_that_culprit_too():
    def run(works: Sequence[Work]) -> list[Rows]:
        if len(works) > 2:
            raise OutOfMemory("no room")
        if any((work.inputs["x"] < 0).any() for work in works):
            raise ValueError("negative")
        return negate(works)

    async with batching(run) as (batcher, recorder):
        first, error, *others = await together(batcher, recorder, [1], [-2], [3], [4])
        assert isinstance(error, ValueError)
        assert [first, *others] == [[-1], [-3], [-4]]


async def test_nothing_runs_again_for_a_caller_who_left():
    small = Small(room=2)
    run = Held(small)
    async with batching(run) as (batcher, recorder):
        batcher.hold()
        waiting = [asking(batcher, value) for value in (1, 2, 3, 4)]
        await until(lambda: recorder.waiting == 4)
        batcher.release()
        await until(run.entered.is_set)
        for gone in waiting[:2]:
            gone.cancel()
        await asyncio.gather(*waiting[:2], return_exceptions=True)
        run.leave.set()
        assert await asyncio.gather(*waiting[2:]) == [[-3], [-4]]
        assert small.ran == [[1, 2, 3, 4], [3, 4]]


async def test_a_batcher_that_closes_meanwhile_answers_whom_it_had_admitted():
    async with batching(Small(room=1)) as (batcher, recorder):
        batcher.hold()
        waiting = [asking(batcher, value) for value in range(6)]
        await until(lambda: recorder.waiting == 6)
        batcher.release()
        assert await batcher.drain(10)
        assert await asyncio.gather(*waiting) == [[-v] for v in range(6)]


def allocate() -> None:
    torch.empty(1 << 46)


def claim() -> None:
    np.empty(1 << 60, np.uint8)


def say(text: str, kind: type[Exception] = RuntimeError) -> Callable[[], None]:
    def run() -> None:
        raise kind(text)

    return run


@pytest.mark.parametrize(
    "run",
    [
        allocate,
        claim,
        say("CUDA out of memory. Tried to allocate 20.00 GiB.", torch.OutOfMemoryError),
        say(
            "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Non-zero status code returned while running Conv node. "
            "Name:'c' Status Message: bfc_arena.cc:376 void* onnxruntime::BFCArena::AllocateRawInternal(size_t) "
            "Failed to allocate memory for requested buffer of size 4585490524"
        ),
        say("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        say("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    ],
    ids=["torch", "numpy", "cuda", "onnxruntime", "cublas", "cudnn"],
)
def test_what_libraries_raise_when_memory_runs_out_is_known(run):
    with pytest.raises(OutOfMemory, match="told") as raised:
        memory.within(run, lambda: "told")
    assert raised.value.__context__ is None


def test_any_other_error_is_left_as_it_is():
    with pytest.raises(RuntimeError, match="shapes differ"):
        memory.within(say("shapes differ"), lambda: "told")
    assert memory.within(lambda: 3, lambda: "told") == 3


def test_what_the_forward_held_is_gone_before_memory_is_given_back(monkeypatch):
    alive: list[bool] = []
    made: list[weakref.ref[torch.Tensor]] = []

    def run() -> None:
        half_way = torch.ones(3)
        made.append(weakref.ref(half_way))
        raise torch.OutOfMemoryError(f"CUDA out of memory beside {half_way.shape}")

    monkeypatch.setattr(cuda, "release", lambda: alive.append(made[0]() is not None))
    gc.disable()
    try:
        with pytest.raises(OutOfMemory):
            memory.within(run, lambda: "told")
    finally:
        gc.enable()
    assert alive == [False]


def test_a_caller_reads_how_many_rows_were_too_many_and_what_helps():
    def function(inputs):
        if len(inputs["x"]) > 2:
            raise MemoryError
        return {"y": inputs["x"]}

    with numeric({"m": Model(function)}) as server:
        with pytest.raises(grpc.RpcError) as raised:
            server.call("ModelInfer", asked("m", np.ones((5, 2), "f4")))
        assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert raised.value.details() == (
            "5 rows of model 'm' together take more memory than the machine has left; "
            "send fewer rows in a request, smaller ones, or ask for fewer layers"
        )
        x = np.ones((2, 2), "f4")
        np.testing.assert_array_equal(values_of(server.call("ModelInfer", asked("m", x))), x)


class Full(FakeCard):
    """Has no memory for the values of more than `room` rows."""

    room = 4

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        if len(source) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate more")
        super().copy(target, source)


def test_a_version_whose_largest_batch_has_no_room_does_not_load_and_says_what_to_set(tmp_path):
    directory = tiny.write(tmp_path, 1, seed=1)
    with use(card=Full):
        with pytest.raises(LoadError) as raised:
            load(directory, ModelSettings(device="cuda", max_batch=8), 1)
        assert load(directory, ModelSettings(device="cuda", max_batch=4), 1).cards == (0,)
    assert str(raised.value) == "8 rows, which are max_batch, take more memory than there is; set a lower max_batch"


async def test_a_work_that_is_alone_in_its_batch_is_not_run_again():
    run = Small(room=1)
    async with batching(run) as (batcher, _):
        with pytest.raises(OutOfMemory):
            await batcher.submit([work(batcher, 1, 2)])
        assert run.ran == [[1, 2]]
