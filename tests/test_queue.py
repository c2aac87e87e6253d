"""The queue: order, grouping, limits, withdrawal."""

import asyncio

import numpy as np
import pytest

from layercast.server.queue import Queue
from layercast.server.work import Work


@pytest.fixture(name="make")
def _make():
    loop = asyncio.new_event_loop()
    clock = iter(range(1000))

    def make(rows: int, key: str = "a") -> Work:
        work = Work({"x": np.zeros((rows, 1), "f4")}, rows, key, loop.create_future())
        work.arrived = float(next(clock))
        return work

    yield make
    loop.close()


def test_takes_in_order_of_arrival_up_to_the_limit(make):
    queue, works = Queue(), [make(3), make(4), make(2)]
    for work in works:
        queue.push(work)
    assert queue.rows == 9
    assert queue.take("a", 7) == works[:2]
    assert queue.rows == 2
    assert queue.take("a", 7) == works[2:]
    assert queue.rows == 0
    assert queue.oldest() is None


def test_a_work_larger_than_the_limit_is_taken_alone(make):
    queue, big, small = Queue(), make(10), make(1)
    queue.push(big)
    queue.push(small)
    assert queue.take("a", 4) == [big]
    assert queue.take("a", 4) == [small]


def test_groups_do_not_mix_and_the_oldest_head_comes_first(make):
    queue, first, second, third = Queue(), make(1, "a"), make(1, "b"), make(1, "a")
    for work in (first, second, third):
        queue.push(work)
    assert queue.oldest() is first
    assert queue.take("a", 8) == [first, third]
    assert queue.oldest() is second
    assert queue.waiting("a", 8) == 0
    assert queue.waiting("b", 8) == 1


def test_waiting_counts_no_further_than_it_must(make):
    queue = Queue()
    for _ in range(5):
        queue.push(make(4))
    assert queue.waiting("a", 9) == 12
    assert queue.waiting("a", 100) == 20


def test_discard_takes_out_of_the_middle_and_forgets_empty_groups(make):
    queue, works = Queue(), [make(1), make(2), make(3)]
    for work in works:
        queue.push(work)
    queue.discard(works[1])
    assert queue.rows == 4
    assert not queue.holds(works[1])
    queue.discard(works[1])
    assert queue.rows == 4
    queue.discard(works[0])
    queue.discard(works[2])
    assert queue.rows == 0
    assert queue.oldest() is None
