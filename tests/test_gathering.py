"""Requests that wait for each other before anything is done for them: each ends as if it had come alone."""

import asyncio
import gc
import threading
from collections.abc import Sequence
from typing import Any

import grpc
import numpy as np
import pytest
from batching import until
from begin import PEER, Context, Subject, request, served, sums
from ends import SCENARIOS, Gate, soon
from gathers import BATCH, Gathering, batches_of_three, ended, hurried
from numeric import Arrays
from test_short import outcome

from layercast.models.manifest import LayerSpec, TensorSpec
from layercast.proto.messages import ModelInferResponse
from layercast.server.inline import NOWHERE, Inline, up_to
from layercast.server.metrics import Metrics
from layercast.server.service import gathering, scopes
from layercast.server.service.callers import Callers
from layercast.server.work import Tap


@pytest.fixture(autouse=True)
def three_callers(monkeypatch):
    batches_of_three(monkeypatch)


class Doubling:
    """Gives one layer: its input twice."""

    name = "numpy"

    def tapped(self, inputs: Arrays, taps: Sequence[Tap], predict: bool) -> tuple[Arrays, dict[Tap, np.ndarray]]:
        return sums(inputs) if predict else {}, dict.fromkeys(taps, inputs["x"] * 2)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
async def test_a_request_that_waited_ends_and_is_counted_as_on_the_general_path(scenario, monkeypatch):
    settings = SCENARIOS[scenario][0]
    general = await outcome(scenario, short=False, **settings)
    made: list[Gathering] = []

    def gathered(short: bool, *args: Any, **model: Any) -> Subject:
        made.append(Gathering(*args, **model))
        return made[0]

    async def none_waits(subject: Subject) -> None:
        await until(lambda: not made[0].waiting)

    monkeypatch.setattr("test_short.Subject", gathered)
    monkeypatch.setattr("ends.begun", none_waits)
    took = []
    monkeypatch.setattr(gathering.Gathering, "take", counted(gathering.Gathering.take, took))
    assert await outcome(scenario, short=True, **settings) == general
    # A request with little time doesn't wait.
    assert took or scenario.__name__.startswith("late") or scenario.__name__ == "cancelled_by_its_deadline"


def counted(function: Any, calls: list[Any]) -> Any:
    def call(*args: Any) -> Any:
        calls.append(args)
        return function(*args)

    return call


async def test_requests_that_waited_run_as_one_on_the_event_loop():
    subject = Gathering()
    asked = [subject.ask(request(*values, identifier=f"{values[0]}")) for values in ((1, 2), (3, 4))]
    await asyncio.sleep(0)
    assert subject.waiting == 2
    assert subject.batches == [0, 0]
    asked.append(subject.ask(request(5, 6, identifier="5")))
    assert subject.waiting == 0
    answers = [await each.ended() for each in asked]
    assert subject.batches == [1, 3]
    assert subject.ran == [threading.main_thread()]
    for answer, first in zip(answers, (1, 3, 5), strict=True):
        assert answer.id == f"{first}"
        assert np.frombuffer(answer.raw_output_contents[0], "f4").tolist() == [2 * first + 1]
        assert answer.parameters["batch_rows"].int64_param == 3
    waits = [answer.parameters["queue_ns"].int64_param for answer in answers]
    assert min(waits) > 0
    assert subject.model._holders == 0
    await subject.batcher.close()


async def test_texts_that_are_too_long_for_the_loop_wait_for_nobody():
    model = served(sums, Metrics(), inline=Inline((*up_to(4).rows, *up_to(2).rows), (16, 32)))
    assert [model.gathers(length) for length in (1, 32, 33)] == [True, True, False]
    await model.batcher.close()


async def test_who_has_nobody_to_wait_for_is_answered_after_a_moment():
    subject = Gathering()
    answer = await subject.ask(request(1, 2)).ended()
    assert answer.parameters["queue_ns"].int64_param > 1_000_000
    await subject.batcher.close()


async def test_only_the_request_that_the_model_fails_for_fails():
    subject = Gathering(Gate())
    asked = [subject.ask(request(value, 1)) for value in (1, -1, 2)]
    good, bad, other = [await each.ended() for each in asked]
    assert bad[0] is grpc.StatusCode.INTERNAL
    assert good.raw_output_contents
    assert other.raw_output_contents
    assert (ended(subject, "OK"), ended(subject, "INTERNAL")) == (2, 1)
    await subject.batcher.close()


async def test_requests_of_several_shapes_wait_together_and_run_apart_or_not_as_always():
    subject = Gathering()
    asked = [subject.ask(request(*values)) for values in ((1, 2), (3, 4, 5, 6), (7, 8))]
    assert subject.waiting == 0
    sums = [np.frombuffer((await each.ended()).raw_output_contents[0], "f4").tolist() for each in asked]
    assert sums == [[3], [7, 11], [15]]
    await subject.batcher.close()


async def test_a_request_that_proves_not_plain_is_answered_on_the_general_path():
    subject = Gathering(inputs=(TensorSpec(name="x", datatype="FP32", shape=(-1, 2), range=(0, 100)),))
    handle = subject.rpc.handler().unary_unary
    messages = [request(1, 2), request(500, 1), request(3, 4), request(5, 6)]
    messages[3].inputs[0].shape[1] = 1  # of which there are two
    messages[2].inputs[0].contents.fp32_contents.extend([3, 4])
    messages[2].raw_input_contents.clear()
    contexts = [Context(None, PEER) for _ in messages]
    calls = [handle(message.SerializeToString(), context) for message, context in zip(messages, contexts, strict=True)]
    *answers, _ = await asyncio.gather(*calls, return_exceptions=True)
    plain, outside, typed = map(ModelInferResponse.FromString, answers)
    assert np.frombuffer(plain.raw_output_contents[0], "f4").tolist() == [3]
    assert outside.parameters["warning"].string_param
    assert typed.outputs[0].contents.fp32_contents == [7]
    assert contexts[3].status
    assert contexts[3].status[0] is grpc.StatusCode.INVALID_ARGUMENT
    assert (ended(subject, "OK"), ended(subject, "INVALID_ARGUMENT")) == (3, 1)
    assert subject.model._holders == 0
    await subject.batcher.close()


async def test_layers_among_requests_that_waited_take_the_scope_of_features_from_each_caller():
    layer = LayerSpec(path="doubled", type="Linear", shape=(-1, 2), datatype="FP32", order=0)
    subject = Gathering(layers=(layer,), taps=Doubling())
    handle, message = subject.rpc.handler().unary_unary, request(1, 2)
    message.outputs.add(name="layer:doubled")
    assert subject.service._parsed(message.SerializeToString())  # so that it is recognised, all with one form
    calls, contexts = [], [Context(None, PEER) for _ in range(BATCH)]
    for granted, context in zip(([scopes.PREDICT], None, [scopes.FEATURES, scopes.PREDICT]), contexts, strict=True):
        scopes.grant(granted)
        calls.append(asyncio.ensure_future(handle(message.SerializeToString(), context)))
    scopes.grant(None)
    refused, *answers = await asyncio.gather(*calls, return_exceptions=True)
    assert isinstance(refused, grpc.aio.AbortError)
    assert contexts[0].status
    assert contexts[0].status[0] is grpc.StatusCode.PERMISSION_DENIED
    for answer in answers:
        assert np.frombuffer(ModelInferResponse.FromString(answer).raw_output_contents[0], "f4").tolist() == [2, 4]
    await subject.batcher.close()


async def test_a_request_with_little_time_waits_for_nobody(monkeypatch):
    subject = Gathering()
    later = subject.ask(request(1, 2), soon(10))
    assert subject.waiting == 1
    assert (await later.ended()).raw_output_contents
    asked = subject.ask(request(1, 2), soon(0.04))
    assert subject.waiting == 0
    await asked.ended()  # on a busy machine it may be late
    asked = subject.ask(request(1, 2), hurried(monkeypatch))
    assert subject.waiting == 0
    assert (await asked.ended()).raw_output_contents
    await subject.batcher.close()


async def test_a_request_of_many_rows_waits_for_nobody():
    subject = Gathering(max_batch=4096)
    asked = subject.ask(request(*range(2 * 2048)))
    assert subject.waiting == 0
    assert (await asked.ended()).outputs[0].shape == [2048]
    await subject.batcher.close()


@pytest.mark.parametrize("limits", [{"inline": NOWHERE}, {"max_delay_ms": 1}, {"batching": False}])
async def test_where_batches_run_in_threads_or_wait_by_themselves_or_are_none_nothing_waits_before(limits):
    subject = Gathering(**limits)
    assert (await subject.ask(request(1, 2)).ended()).raw_output_contents
    assert not subject.service._gatherings
    await subject.batcher.close()


async def test_what_waits_is_bounded_by_the_largest_batch(monkeypatch):
    monkeypatch.setattr(Callers, "enough", lambda self, requests: self._all_here)
    subject = Gathering(max_batch=4)
    asked = [subject.ask(request(1, 2)) for _ in range(6)]
    assert subject.waiting == 2
    for each in asked:
        await each.ended()
    await subject.batcher.close()


async def test_requests_that_waited_leave_nothing_for_the_garbage_collection():
    subject = Gathering()

    async def ends() -> None:
        told: list[object] = []
        for _ in range(3):
            subject.rpc.short.begin(request(1, 2).SerializeToString(), None, PEER, lambda *_: told.append(True))
        await until(lambda: len(told) == 3)

    await ends()
    gc.collect()
    gc.disable()
    try:
        for _ in range(50):
            await ends()
        assert gc.collect() < 50
    finally:
        gc.enable()
        await subject.batcher.close()
