"""Every way in which a request may end, acted out on a model that is asked without a transport."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy as np
from batching import until
from begin import Asked, Subject, request, sums
from numeric import Arrays

from layercast.server.errors import ModelFailed

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
        await begun(subject)
    return asked


async def begun(subject: Subject) -> None:
    """Return once what was asked is in the queue."""
    await asyncio.sleep(0)  # the general path's task queues the rows in its first step


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
    subject.function.leave.set()
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
    await until(subject.function.entered.is_set)
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
    await until(subject.function.entered.is_set)
    gone.cancel(False)
    await until(lambda: subject.model._holders == 0)
    subject.function.leave.set()
    kept = subject.ask(request(1, 1))
    await kept.ended()
    assert gone.told == []
    return [kept]


SCENARIOS: dict[Scenario, tuple[dict[str, Any], list[str]]] = {
    answered: ({}, ["OK"] * 3),
    full: ({"queue_rows": 16}, ["OK", "OK", "UNAVAILABLE"]),
    evicted: ({"queue_rows": 12}, ["OK", "UNAVAILABLE", "OK"]),
    late_on_arrival: ({}, ["DEADLINE_EXCEEDED"]),
    late_in_the_queue: ({}, ["DEADLINE_EXCEEDED", "OK"]),
    late_while_running: ({}, ["DEADLINE_EXCEEDED"]),
    timed_out: ({"queue_timeout_ms": 20}, ["UNAVAILABLE"]),
    draining: ({}, ["OK", "UNAVAILABLE"]),
    closed_while_queued: ({}, ["UNAVAILABLE"] * 2),
    closed_while_running: ({}, ["UNAVAILABLE"]),
    poisoned: ({}, ["OK", "INTERNAL", "OK", "INTERNAL", "OK"]),
    broken: ({}, ["INTERNAL"] * 2),
    out_of_memory: ({}, ["OK", "RESOURCE_EXHAUSTED", "OK", "OK"]),
    cancelled_in_the_queue: ({}, ["OK"]),
    cancelled_by_its_deadline: ({}, []),
    cancelled_while_running: ({}, ["OK"]),
}
"""With what settings of the model each is acted out, and the status of each request that is told its end."""
