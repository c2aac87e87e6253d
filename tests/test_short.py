"""The short path of ModelInfer: every way to end gives the status, and the counts, of the general path."""

import asyncio
import gc
import re
import threading
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import grpc
import numpy as np
import pytest
from batching import until
from begin import PEER, Asked, Subject, request, sums
from numeric import Arrays

from layercast.proto.messages import ModelInferResponse
from layercast.server.errors import ModelFailed
from layercast.server.service import scopes

Scenario = Callable[[Subject], Awaitable[Sequence[Asked]]]


class Gate:
    """Sums rows, but waits for leave if there is a 9 among them, and raises what a negative row stands for."""

    def __init__(self) -> None:
        self.entered, self.leave = threading.Event(), threading.Event()

    def __call__(self, inputs: Arrays) -> dict[str, np.ndarray]:
        first = inputs["x"][:, 0]
        if 9 in first:
            self.entered.set()
            assert self.leave.wait(30)
        for value, error in ((-1, ValueError), (-2, ModelFailed), (-3, StopIteration)):
            if value in first:
                raise error("broken")
        if len(first) > 2 and 5 in first:
            raise MemoryError
        return sums(inputs)


def soon(seconds: float) -> float:
    return asyncio.get_running_loop().time() + seconds


async def queued(subject: Subject, *asks: tuple[Any, ...]) -> list[Asked]:
    """Queue requests, none of which runs before `release`; each is given as (message, deadline, peer)."""
    subject.batcher.hold()
    asked = []
    for ask in asks:
        asked.append(subject.ask(*ask))
        await asyncio.sleep(0)  # the general path's task queues the rows in its first step
    return asked


async def answered(subject: Subject) -> Sequence[Asked]:
    asked = await queued(subject, (request(1, 2),), (request(3, 4, 5, 6, identifier=""),), (request(0, 1), soon(30)))
    subject.batcher.release()
    return asked


async def full(subject: Subject) -> Sequence[Asked]:
    asked = await queued(subject, (request(*range(16)),), (request(*range(8)),))
    refused = subject.ask(request(*range(10)))
    await refused.ended()
    subject.batcher.release()
    return [*asked, refused]


async def evicted(subject: Subject) -> Sequence[Asked]:
    asked = await queued(subject, (request(*range(16)),), (request(*range(8)),), (request(1, 1, 1, 1), None, "other"))
    subject.batcher.release()
    return asked


async def late_on_arrival(subject: Subject) -> Sequence[Asked]:
    return [subject.ask(request(1, 2), soon(-0.01))]


async def late_in_the_queue(subject: Subject) -> Sequence[Asked]:
    asked = await queued(subject, (request(1, 2), soon(0.02)), (request(3, 4),))
    await asked[0].ended()
    subject.batcher.release()
    return asked


async def late_while_running(subject: Subject) -> Sequence[Asked]:
    asked = [subject.ask(request(9, 9), soon(0.05))]
    await asked[0].ended()
    subject.gate.leave.set()
    return asked


async def timed_out(subject: Subject) -> Sequence[Asked]:
    asked = await queued(subject, (request(1, 2),))
    await asked[0].ended()
    subject.batcher.release()
    return asked


async def draining(subject: Subject) -> Sequence[Asked]:
    asked = await queued(subject, (request(1, 2),))
    await subject.batcher.drain()
    return [*asked, subject.ask(request(3, 4))]


async def closed_while_queued(subject: Subject) -> Sequence[Asked]:
    asked = await queued(subject, (request(1, 2),), (request(3, 4),))
    await subject.batcher.close()
    return asked


async def closed_while_running(subject: Subject) -> Sequence[Asked]:
    asked = [subject.ask(request(9, 9))]
    await until(subject.gate.entered.is_set)
    await subject.batcher.close(0.01)
    return asked


async def poisoned(subject: Subject) -> Sequence[Asked]:
    asked = await queued(subject, *((request(value, 1),) for value in (1, -1, 2, -3, 3)))
    subject.batcher.release()
    return asked


async def broken(subject: Subject) -> Sequence[Asked]:
    asked = await queued(subject, (request(1, 2),), (request(-2, 2),))
    subject.batcher.release()
    return asked


async def out_of_memory(subject: Subject) -> Sequence[Asked]:
    asked = await queued(subject, (request(1, 2),), (request(5, 2, 1, 1, 1, 1),), (request(2, 2),), (request(5, 5),))
    subject.batcher.release()
    return asked


async def cancelled_in_the_queue(subject: Subject) -> Sequence[Asked]:
    gone, kept = await queued(subject, (request(1, 2), soon(30)), (request(3, 4),))
    gone.cancel(False)
    await until(lambda: subject.batcher.queued_rows == 1)
    subject.batcher.release()
    await kept.ended()
    assert gone.told == []
    return [kept]


async def cancelled_by_its_deadline(subject: Subject) -> Sequence[Asked]:
    (gone,) = await queued(subject, (request(1, 2), soon(0.01)))
    gone.cancel(True)
    await until(lambda: subject.batcher.queued_rows == 0)
    await until(lambda: subject.model._holders == 0)
    assert gone.told == []
    return []


async def cancelled_while_running(subject: Subject) -> Sequence[Asked]:
    gone = subject.ask(request(9, 9))
    await until(subject.gate.entered.is_set)
    gone.cancel(False)
    await until(lambda: subject.model._holders == 0)
    subject.gate.leave.set()
    kept = subject.ask(request(1, 1))
    await kept.ended()
    assert gone.told == []
    return [kept]


SCENARIOS: dict[Scenario, dict[str, Any]] = {
    answered: {},
    full: {"queue_rows": 16},
    evicted: {"queue_rows": 12},
    late_on_arrival: {},
    late_in_the_queue: {},
    late_while_running: {},
    timed_out: {"queue_timeout_ms": 20},
    draining: {},
    closed_while_queued: {},
    closed_while_running: {},
    poisoned: {},
    broken: {},
    out_of_memory: {},
    cancelled_in_the_queue: {},
    cancelled_by_its_deadline: {},
    cancelled_while_running: {},
}


async def outcome(scenario: Scenario, short: bool, **model: Any) -> tuple[list[Any], dict[Any, float]]:
    """Return how all requests of a scenario ended, and all that was counted."""
    gate = Gate()
    subject = Subject(short, gate, **model)
    subject.gate = gate  # type: ignore[attr-defined]
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
    short = await outcome(scenario, short=True, **SCENARIOS[scenario])
    general = await outcome(scenario, short=False, **SCENARIOS[scenario])
    assert short[0] == general[0]
    assert short[1] == general[1]


async def test_the_scenarios_end_in_every_way():
    """Else the two paths would be alike in less than they seem to be."""
    codes = {}
    for scenario, settings in SCENARIOS.items():
        ends, _ = await outcome(scenario, short=True, **settings)
        codes[scenario] = [end[0].name if isinstance(end, tuple) else "OK" for end in ends]
    assert codes == {
        answered: ["OK"] * 3,
        full: ["OK", "OK", "UNAVAILABLE"],
        evicted: ["OK", "UNAVAILABLE", "OK"],
        late_on_arrival: ["DEADLINE_EXCEEDED"],
        late_in_the_queue: ["DEADLINE_EXCEEDED", "OK"],
        late_while_running: ["DEADLINE_EXCEEDED"],
        timed_out: ["UNAVAILABLE"],
        draining: ["OK", "UNAVAILABLE"],
        closed_while_queued: ["UNAVAILABLE"] * 2,
        closed_while_running: ["UNAVAILABLE"],
        poisoned: ["OK", "INTERNAL", "OK", "INTERNAL", "OK"],
        broken: ["INTERNAL"] * 2,
        out_of_memory: ["OK", "RESOURCE_EXHAUSTED", "OK", "OK"],
        cancelled_in_the_queue: ["OK"],
        cancelled_by_its_deadline: [],
        cancelled_while_running: ["OK"],
    }


async def test_a_request_that_is_refused_at_once_is_told_so_inside_begin():
    subject = Subject(short=True)
    told: list[Any] = []
    begun = subject.rpc.begin(request(1, 2).SerializeToString(), soon(-1), PEER, lambda *end: told.append(end))
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

    subject.rpc.begin(raw, None, PEER, fail)
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
            subject.rpc.begin(raw, None, PEER, again)
        else:
            over.set()

    subject.rpc.begin(raw, None, PEER, again)
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
    subject.rpc.begin(request(*values or (1, 2)).SerializeToString(), deadline, PEER, lambda *_: told.append(True))
    await until(lambda: bool(told))


async def leaves(subject: Subject) -> None:
    begun = subject.rpc.begin(request(1, 2).SerializeToString(), None, PEER, lambda *_: None)
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
