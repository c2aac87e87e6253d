"""Requests that wait for each other, and what comes between: callers who leave, models that go, faults, time."""

import asyncio
import gc
import weakref
from collections.abc import Sequence
from typing import Any

import grpc
import numpy as np
import pytest
from batching import until
from begin import PEER, Context, request, served
from ends import Gate
from gathers import BATCH, ENOUGH, INLINE, Gathering, batches_of_three, ended, hurried, started

from layercast.models.manifest import TensorSpec
from layercast.proto.messages import ModelInferResponse
from layercast.server.metrics import Metrics
from layercast.server.service.callers import Callers
from layercast.server.service.form import Form
from layercast.server.service.short import Short


@pytest.fixture(autouse=True)
def three_callers(monkeypatch):
    batches_of_three(monkeypatch)


async def test_a_caller_who_leaves_while_it_waits_is_counted_and_its_rows_never_run():
    subject = Gathering()
    gone, late, *kept = [subject.ask(request(value, 1)) for value in (1, 2)]
    gone.cancel(False)
    late.cancel(True)
    assert subject.waiting == 0
    kept = [subject.ask(request(value, 1)) for value in (3, 4, 5)]
    for each in kept:
        await each.ended()
    assert subject.batches == [1, 3]
    assert gone.told == late.told == []
    assert ended(subject, "CANCELLED") == ended(subject, "DEADLINE_EXCEEDED") == 1
    assert subject.metrics.cancelled.labels("m", "1", "queued").value == 1
    assert subject.metrics.expired.labels("m", "1", "queued").value == 1
    assert subject.model._holders == 0
    await subject.batcher.close()


async def test_a_caller_who_leaves_costs_nobody_a_place_in_a_full_queue(monkeypatch):
    subject = Gathering(queue_rows=1, queue_timeout_ms=5000)
    subject.batcher.hold()
    queued = subject.rpc.short.begin(
        request(*range(2)).SerializeToString(), hurried(monkeypatch), "other", lambda *_: None
    )
    assert isinstance(queued, Short)
    subject.ask(request(1, 2)).cancel(False)
    assert subject.batcher.queued_rows == 1
    assert not queued.done()
    assert (ended(subject, "CANCELLED"), ended(subject, "UNAVAILABLE")) == (1, 0)
    subject.batcher.release()
    await until(queued.done)
    assert ended(subject, "OK") == 1
    await subject.batcher.close()


async def test_requests_of_several_peers_run_at_once_so_that_no_other_can_come_between():
    subject = Gathering(queue_rows=4)
    subject.batcher._patience._bunch = 8.0  # in which case other batches would wait for what the next passes bring
    asked = [subject.ask(request(value, 1), None, f"{value}") for value in range(BATCH)]
    assert subject.batcher.queued_rows == 0
    assert all(each.told for each in asked)
    asked[0].cancel(False)  # too late
    assert (ended(subject, "OK"), ended(subject, "CANCELLED")) == (3, 0)
    assert subject.model._holders == 0
    await subject.batcher.close()


@pytest.mark.parametrize("stop", ["drain", "unload"])
async def test_what_waits_when_the_model_goes_was_admitted(stop):
    subject = Gathering()
    asked = [subject.ask(request(value, 1)) for value in (1, 2)]
    assert subject.waiting == 2
    if stop == "unload":
        subject.service._answering._repository.models.clear()  # type: ignore[attr-defined]
    subject.model.hurry()
    assert subject.model._holders or all(each.told for each in asked)
    await subject.batcher.drain()
    for each in asked:
        assert (await each.ended()).raw_output_contents
    if stop == "drain":
        assert (await subject.ask(request(3, 1)).ended())[0] is grpc.StatusCode.UNAVAILABLE
    assert subject.waiting == 0
    await subject.batcher.close()


async def test_a_model_that_takes_the_place_of_another_has_its_own_waiting():
    subject = Gathering()
    shelf = subject.service._answering._repository
    for each in [subject.ask(request(value, 1)) for value in (1, 2, 3)]:
        await each.ended()
    old, new = subject.model, served(lambda inputs: {"y": inputs["x"].sum(1) * 2}, Metrics(), inline=INLINE)
    shelf.models["m", 1] = new
    early = subject.ask(request(3, 4))
    assert subject.waiting == 1
    assert np.frombuffer((await early.ended()).raw_output_contents[0], "f4").tolist() == [14]
    await old.batcher.close()
    gone = weakref.ref(old.mark)
    del old, subject.model, each  # a call keeps what answered it
    gc.collect()
    assert gone() is None
    assert len(subject.service._gatherings) == 1
    await new.batcher.close()


async def test_the_queue_timeout_counts_from_when_a_request_came():
    subject = Gathering(queue_timeout_ms=60_000)
    subject.batcher.hold()  # so that each is queued by itself
    asked = [subject.ask(request(value, 1)) for value in (1, 2)]
    for each in subject.service._gatherings[subject.model.mark]._waiting:
        each.came -= 59_990_000_000
    asked.append(subject.ask(request(3, 1)))
    for each in asked[:2]:
        assert (await each.ended())[0] is grpc.StatusCode.UNAVAILABLE
    assert not asked[2].told
    subject.batcher.release()
    assert (await asked[2].ended()).raw_output_contents
    await subject.batcher.close()


async def test_the_queue_timeout_goes_on_for_requests_that_are_queued_again():
    subject = Gathering(Gate(), queue_timeout_ms=60_000)
    asked = [subject.ask(request(value, 1)) for value in (-1, 2)]
    for each in subject.service._gatherings[subject.model.mark]._waiting:
        each.came -= 59_990_000_000
    asked.append(subject.ask(request(3, 1)))  # the model fails for them together
    subject.batcher.hold()
    for each in asked[:2]:
        assert (await each.ended())[0] is grpc.StatusCode.UNAVAILABLE
    subject.batcher.release()
    assert (await asked[2].ended()).raw_output_contents
    assert subject.model._holders == 0
    await subject.batcher.close()


async def test_who_is_alone_waits_seldom_and_who_is_not_comes_to_share(monkeypatch):
    monkeypatch.setattr(Callers, "enough", ENOUGH)
    subject, waited = Gathering(), 0
    for value in range(200):
        ends: list[Any] = []
        begun = subject.rpc.short.begin(
            request(value, 1).SerializeToString(), None, PEER, lambda *end, to=ends: to.append(end)
        )
        waited += not isinstance(begun, Short)
        await until(lambda to=ends: to)
    assert 0 < waited < 10
    assert subject.batches == [200, 200]
    for _ in range(300):
        for each in [subject.ask(request(value, 1)) for value in range(8)]:
            await each.ended()
        forwards, rows = subject.batches
        if forwards < rows:
            break
    assert forwards < rows
    await subject.batcher.close()


async def test_a_caller_may_leave_while_the_rows_of_a_failed_batch_run_one_by_one():
    gate = Gate()
    subject = Gathering(gate, max_batch=8)
    asked = [subject.ask(request(value, 1)) for value in (1, -1, 2)]
    subject.function.leave.clear()
    subject.batcher.hold()  # the parts, which are queued once the batch has failed
    await asyncio.sleep(0)
    subject.batcher.release()
    asked[0].cancel(False)
    await asked[1].ended()
    await asked[2].ended()
    assert asked[0].told == []
    assert (ended(subject, "OK"), ended(subject, "INTERNAL"), ended(subject, "CANCELLED")) == (1, 1, 1)
    assert subject.model._holders == 0
    await subject.batcher.close()


async def test_requests_that_are_not_plain_wait_for_nobody():
    subject = Gathering()
    typed, prior = request(1, 2), request(1, 2)
    typed.inputs[0].contents.fp32_contents.extend([1, 2])
    typed.raw_input_contents.clear()
    prior.parameters["priority"].uint64_param = 1
    for message in (typed, prior):
        assert subject.ask(message) is None
    assert not subject.waiting
    await subject.batcher.close()


async def test_a_fault_at_the_beginning_is_only_that_requests(monkeypatch, caplog):
    """It is declined: the general path says what the fault is, and counts it, once."""
    subject = Gathering()
    handle, inputs = subject.rpc.handler().unary_unary, Form.inputs

    def faulty(form: Form, contents: Sequence[bytes]) -> Any:
        return 1 / 0 if np.frombuffer(contents[0], "f4")[0] == 2 else inputs(form, contents)

    monkeypatch.setattr(Form, "inputs", faulty)
    monkeypatch.setattr(Form, "together", lambda *_: 1 / 0)
    contexts = [Context(None, PEER) for _ in range(3)]
    calls = [handle(request(at + 1, 1).SerializeToString(), context) for at, context in enumerate(contexts)]
    first, fault, last = await asyncio.gather(*calls, return_exceptions=True)
    assert ModelInferResponse.FromString(first).raw_output_contents
    assert ModelInferResponse.FromString(last).raw_output_contents
    assert isinstance(fault, grpc.aio.AbortError)
    assert contexts[1].status
    assert contexts[1].status[0] is grpc.StatusCode.INTERNAL
    assert (ended(subject, "OK"), ended(subject, "INTERNAL")) == (2, 1)
    assert started(subject) == 3
    assert "could not be begun together" in caplog.text
    assert subject.model._holders == 0
    await subject.batcher.close()


async def test_a_declined_call_whose_caller_leaves_at_once_is_counted_once():
    subject = Gathering(inputs=(TensorSpec(name="x", datatype="FP32", shape=(-1, 2), range=(0, 100)),))
    asked = [subject.ask(request(value, 1)) for value in (500, 1, 2)]
    assert asked[0].told == [None]
    asked[0].cancel(False)
    for each in asked[1:]:
        await each.ended()
    assert started(subject) == 3
    await subject.batcher.close()
