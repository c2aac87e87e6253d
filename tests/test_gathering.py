"""Requests that wait for each other before anything is done for them: each ends as if it had come alone."""

import asyncio
import gc
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import grpc
import numpy as np
import pytest
from batching import until
from begin import PEER, Context, Subject, request, served, sums
from ends import SCENARIOS, Gate, soon
from numeric import Arrays
from test_short import outcome

from layercast.models.manifest import LayerSpec, TensorSpec
from layercast.proto.messages import ModelInferResponse
from layercast.server.metrics import Metrics
from layercast.server.service import gathering, scopes
from layercast.server.service.callers import Callers
from layercast.server.service.form import Form
from layercast.server.service.short import Short
from layercast.server.work import Tap

BATCH = 3
INLINE = (8, 8)
ENOUGH = Callers.enough


@pytest.fixture(autouse=True)
def three_callers(monkeypatch):
    """Take it that there are callers enough for batches of three, and few milliseconds until all are here."""
    monkeypatch.setattr(Callers, "enough", lambda self, requests: self._all_here or requests >= BATCH)


class Gathering(Subject):
    """A model whose requests wait for each other, from the first on."""

    def __init__(self, *args: Any, **model: Any) -> None:
        self.ran: list[threading.Thread] = []
        function, *rest = args or [sums]

        def noted(inputs: Arrays) -> dict[str, np.ndarray]:
            self.ran.append(threading.current_thread())
            return function(inputs)

        super().__init__(True, noted, *rest, **{"inline": INLINE, **model})
        self.function = function

    @property
    def waiting(self) -> int:
        return sum(len(each._waiting) for each in self.service._gatherings.values())

    @property
    def batches(self) -> list[float]:
        """How many rows the forwards had: of up to 1, 2, 4 rows and so on."""
        samples = self.metrics.batch_rows.labels("m", "1").samples()
        found = {suffix: value for suffix, _, value in samples if suffix != "_bucket"}
        return [found["_count"], found["_sum"]]


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


async def test_who_has_nobody_to_wait_for_is_answered_after_a_moment():
    subject = Gathering()
    answer = await subject.ask(request(1, 2)).ended()
    assert answer.parameters["queue_ns"].int64_param > 1_000_000
    await subject.batcher.close()


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


async def test_a_caller_who_leaves_costs_nobody_a_place_in_a_full_queue():
    subject = Gathering(queue_rows=1, queue_timeout_ms=5000)
    subject.batcher.hold()
    queued = subject.rpc.begin(request(*range(2)).SerializeToString(), soon(0.04), "other", lambda *_: None)
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
    gone = weakref.ref(old)
    del old, subject.model, each  # a call keeps what answered it
    gc.collect()
    assert gone() is None
    assert len(subject.service._gatherings) == 1
    await new.batcher.close()


async def test_the_queue_timeout_counts_from_when_a_request_came():
    subject = Gathering(queue_timeout_ms=60_000)
    subject.batcher.hold()  # so that each is queued by itself
    asked = [subject.ask(request(value, 1)) for value in (1, 2)]
    for each in subject.service._gatherings[subject.model]._waiting:
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
    for each in subject.service._gatherings[subject.model]._waiting:
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
        begun = subject.rpc.begin(
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


async def test_only_the_request_that_the_model_fails_for_fails():
    subject = Gathering(Gate())
    asked = [subject.ask(request(value, 1)) for value in (1, -1, 2)]
    good, bad, other = [await each.ended() for each in asked]
    assert bad[0] is grpc.StatusCode.INTERNAL
    assert good.raw_output_contents
    assert other.raw_output_contents
    assert (ended(subject, "OK"), ended(subject, "INTERNAL")) == (2, 1)
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


async def test_a_request_with_little_time_waits_for_nobody():
    subject = Gathering()
    asked = subject.ask(request(1, 2), soon(0.04))
    assert subject.waiting == 0
    assert (await asked.ended()).raw_output_contents
    later = subject.ask(request(1, 2), soon(10))
    assert subject.waiting == 1
    assert (await later.ended()).raw_output_contents
    await subject.batcher.close()


async def test_a_request_of_many_rows_waits_for_nobody():
    subject = Gathering(max_batch=4096)
    asked = subject.ask(request(*range(2 * 2048)))
    assert subject.waiting == 0
    assert (await asked.ended()).outputs[0].shape == [2048]
    await subject.batcher.close()


@pytest.mark.parametrize("limits", [{"inline": (0, 0)}, {"max_delay_ms": 1}, {"batching": False}])
async def test_where_batches_run_in_threads_or_wait_by_themselves_or_are_none_nothing_waits_before(limits):
    subject = Gathering(**limits)
    assert (await subject.ask(request(1, 2)).ended()).raw_output_contents
    assert not subject.service._gatherings
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


async def test_what_waits_is_bounded_by_the_largest_batch(monkeypatch):
    monkeypatch.setattr(Callers, "enough", lambda self, requests: self._all_here)
    subject = Gathering(max_batch=4)
    asked = [subject.ask(request(1, 2)) for _ in range(6)]
    assert subject.waiting == 2
    for each in asked:
        await each.ended()
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


async def test_requests_that_waited_leave_nothing_for_the_garbage_collection():
    subject = Gathering()

    async def ends() -> None:
        told: list[object] = []
        for _ in range(3):
            subject.rpc.begin(request(1, 2).SerializeToString(), None, PEER, lambda *_: told.append(True))
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


def ended(subject: Subject, code: str) -> float:
    return subject.metrics.requests.labels("m", "1", "predict", code).value


def started(subject: Subject) -> float:
    return next(value for name, value in subject.counts().items() if name[0] == "grpc_server_started_total")
