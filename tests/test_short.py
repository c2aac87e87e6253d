"""The short path of ModelInfer: every way to end gives the status, and the counts, of the general path."""

import asyncio
import gc
import re
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import pytest
from batching import until
from begin import PEER, Subject, request
from ends import SCENARIOS, Gate, Scenario, soon

from layercast.proto.messages import ModelInferResponse
from layercast.server.service import scopes


async def outcome(scenario: Scenario, short: bool, **model: Any) -> tuple[list[Any], dict[Any, float]]:
    """Return how all requests of a scenario ended, and all that was counted."""
    gate = Gate()
    subject = Subject(short, gate, **model)
    try:
        asked = await scenario(subject)
        ends = [steady(await each.ended()) for each in asked]
        assert all(len(each.told) == 1 for each in asked)
    finally:
        gate.leave.set()
        await subject.batcher.close()
    assert subject.model._holders == 0
    assert subject.batcher.queued_rows == 0
    return ends, subject.counts()


def steady(end: Any) -> Any:
    """Return the end of a call without what differs each time: measured times, and the ids of bugs."""
    if isinstance(end, ModelInferResponse):
        assert end.parameters["queue_ns"].int64_param >= 0
        assert end.parameters["compute_ns"].int64_param > 0
        for name in ("queue_ns", "compute_ns"):
            end.parameters[name].int64_param = 1
        return end
    code, text, trailers = end
    if code is grpc.StatusCode.INTERNAL:
        text = re.sub(r"[0-9a-f]{12}", "ID", text)
    return code, text, trailers


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
async def test_a_request_ends_and_is_counted_as_on_the_general_path(scenario):
    short = await outcome(scenario, short=True, **SCENARIOS[scenario][0])
    general = await outcome(scenario, short=False, **SCENARIOS[scenario][0])
    assert short[0] == general[0]
    assert short[1] == general[1]


async def test_the_scenarios_end_in_every_way():
    """Else the two paths would be alike in less than they seem to be."""
    for scenario, (settings, codes) in SCENARIOS.items():
        ends, _ = await outcome(scenario, short=True, **settings)
        assert [end[0].name if isinstance(end, tuple) else "OK" for end in ends] == codes, scenario


async def test_a_request_that_is_refused_at_once_is_told_so_inside_begin():
    subject = Subject(short=True)
    told: list[Any] = []
    begun = subject.rpc.short.begin(request(1, 2).SerializeToString(), soon(-1), PEER, lambda *end: told.append(end))
    assert begun
    ((content, failed),) = told
    assert content is None
    assert failed.code is grpc.StatusCode.DEADLINE_EXCEEDED
    begun.cancel(False)  # too late: counted once
    assert (
        subject.counts()[
            "layercast_requests_total",
            (("code", "DEADLINE_EXCEEDED"), ("kind", "predict"), ("model", "m"), ("version", "1")),
        ]
        == 1
    )
    assert len(told) == 1
    await subject.batcher.close()


async def test_who_fails_to_take_an_answer_harms_nobody(caplog):
    subject = Subject(short=True)
    subject.batcher.hold()
    raw = request(1, 2).SerializeToString()

    def fail(*_: object) -> None:
        raise ValueError("mine")

    subject.rpc.short.begin(raw, None, PEER, fail)
    asked = subject.ask(raw)
    subject.batcher.release()
    assert (await asked.ended()).outputs[0].shape == [1]
    assert "mine" in caplog.text
    assert (await subject.ask(raw).ended()).outputs[0].shape == [1]
    assert subject.model._holders == 0
    await subject.batcher.close()


async def test_an_answer_may_begin_the_next_request():
    subject = Subject(short=True)
    raw, left = request(1, 2).SerializeToString(), 5
    over = asyncio.Event()

    def again(content: bytes | None, _: object) -> None:
        nonlocal left
        assert content
        left -= 1
        if left:
            subject.rpc.short.begin(raw, None, PEER, again)
        else:
            over.set()

    subject.rpc.short.begin(raw, None, PEER, again)
    async with asyncio.timeout(10):
        await over.wait()
    await subject.batcher.close()


async def test_a_caller_without_the_scope_goes_the_general_way_which_refuses_it():
    subject = Subject(short=True)
    for granted, taken in (([scopes.FEATURES], False), ([scopes.PREDICT], True), (None, True)):
        scopes.grant(granted)
        asked = subject.ask(request(1, 2))
        assert bool(asked) is taken
        if asked:
            await asked.ended()
    await subject.batcher.close()


MANY = 50


async def ends(subject: Subject, deadline: float | None = None, *values: float) -> None:
    """Ask once, and wait for the end without a reference to the request."""
    told: list[object] = []
    subject.rpc.short.begin(
        request(*values or (1, 2)).SerializeToString(), deadline, PEER, lambda *_: told.append(True)
    )
    await until(lambda: bool(told))


async def leaves(subject: Subject) -> None:
    begun = subject.rpc.short.begin(request(1, 2).SerializeToString(), None, PEER, lambda *_: None)
    assert begun
    begun.cancel(False)


WAYS: dict[str, tuple[Callable[[Subject], Awaitable[None]], bool, dict[str, Any]]] = {
    "answered": (ends, False, {}),
    "late": (lambda subject: ends(subject, soon(0.0005)), True, {}),
    "late on arrival": (lambda subject: ends(subject, soon(-1)), True, {}),
    "timed out": (ends, True, {"queue_timeout_ms": 1}),
    "failed": (lambda subject: ends(subject, None, -2, 1), False, {}),
    "cancelled": (leaves, True, {}),
}


@pytest.mark.parametrize("way", WAYS)
async def test_a_request_leaves_nothing_for_the_garbage_collection(way):
    end, hold, settings = WAYS[way]
    subject = Subject(True, Gate(), **settings)
    if hold:
        subject.batcher.hold()
    await end(subject)
    gc.collect()
    gc.disable()
    try:
        for _ in range(MANY):
            await end(subject)
        assert gc.collect() < MANY
    finally:
        gc.enable()
        await subject.batcher.close()
