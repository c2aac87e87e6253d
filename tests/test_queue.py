"""The queue as plain data: order, groups, turns between peers, priorities, withdrawal, and what each costs."""

import time
from collections.abc import Callable

import numpy as np
import pytest

from layercast.server.batching.queue import Held, Queue
from layercast.server.work import Work

Make = Callable[..., Work]


@pytest.fixture(name="make")
def _make() -> Make:
    clock = iter(range(1, 1_000_000))

    def make(rows: int, key: str = "a", peer: str = "", priority: int = 1) -> Work:
        inputs = {"x": np.zeros((rows, 1), "f4")}
        work = Work(inputs, rows, key, 4 * rows)
        work.peer, work.priority, work.arrived = peer, priority, next(clock)
        return work

    return make


def counts(held: Held) -> tuple[int, int, int, int]:
    return held.works, held.rows, held.bytes, held.requests


def filled(works: list[Work], ripe: int = 8) -> Queue:
    queue = Queue(ripe)
    for work in works:
        queue.push(work)
    return queue


def test_takes_in_order_of_arrival_up_to_the_limit(make):
    works = [make(3), make(4), make(2)]
    queue = filled(works)
    assert counts(queue.held) == (3, 9, 36, 3)
    assert queue.batch(works[0], 7) == works[:2]
    queue.take(works[:2])
    assert queue.held.rows == 2
    assert queue.batch(works[2], 7) == works[2:]
    queue.take(works[2:])
    assert counts(queue.held) == (0, 0, 0, 0)
    assert queue.oldest() is None
    assert queue.peers == {}


def test_a_work_larger_than_the_limit_is_taken_alone(make):
    big, small = works = [make(10), make(1)]
    queue = filled(works)
    assert queue.batch(big, 4) == [big]
    queue.take([big])
    assert queue.batch(small, 4) == [small]


def test_groups_do_not_mix_and_the_oldest_head_leads(make):
    first, second, third = works = [make(1, "a"), make(1, "b"), make(1, "a")]
    queue = filled(works)
    assert next(queue.leads(until=9)) is first
    assert queue.batch(first, 8) == [first, third]
    queue.take([first, third])
    assert next(queue.leads(until=9)) is second
    assert (queue.group_rows("a"), queue.group_rows("b")) == (0, 1)


def test_only_ripe_groups_may_lead_before_their_delay_is_over(make):
    first, *_ = works = [make(1, "a"), make(2, "b"), make(2, "b"), make(2, "c"), make(2, "c")]
    queue = filled(works, ripe=4)
    assert queue.ripe()
    assert list(queue.leads(until=0)) == [works[1], works[3]]
    assert next(queue.leads(until=first.arrived)) is first
    queue.discard(works[2])
    assert list(queue.leads(until=0)) == [works[3]]
    queue.discard(works[4])
    assert not queue.ripe()


def test_discard_takes_out_of_the_middle_and_forgets_empty_groups(make):
    works = [make(1), make(2), make(3)]
    queue = filled(works)
    assert queue.discard(works[1])
    assert queue.held.rows == 4
    assert works[1] not in queue
    assert not queue.discard(works[1])
    assert queue.held.rows == 4
    assert queue.discard(works[0])
    assert queue.discard(works[2])
    assert (queue.held.rows, len(queue), queue.oldest()) == (0, 0, None)


def test_peers_take_turns_within_a_batch_and_between_batches(make):
    greedy = [make(1, peer="greedy") for _ in range(6)]
    small = [make(1, peer="small") for _ in range(2)]
    queue = filled([*greedy, *small])
    first = queue.batch(greedy[0], 4)
    assert first == [greedy[0], small[0], greedy[1], small[1]]
    queue.take(first[:3])
    assert next(queue.leads(until=99)) is small[1]
    assert queue.batch(small[1], 2) == [small[1], greedy[2]]


def test_turns_hold_across_groups_too(make):
    greedy = [make(1, "a", "greedy") for _ in range(3)]
    small = make(1, "b", "small")
    queue = filled([*greedy, small])
    queue.take(queue.batch(next(queue.leads(until=99)), 1))
    assert next(queue.leads(until=99)) is small


def test_within_a_group_the_lead_comes_first_and_then_whose_turn_it_is_there(make):
    first, second, other, third = make(1, peer="a"), make(1, peer="a"), make(1, peer="b"), make(1, peer="c")
    elsewhere = make(1, "j", peer="b")
    queue = filled([first, second, other, third, elsewhere])
    queue.take([first])
    assert queue.batch(other, 3) == [other, third, second]
    queue.take([elsewhere])
    assert queue.batch(second, 3) == [second, other, third]


def test_a_large_work_without_room_keeps_its_turn_while_smaller_ones_of_others_go_on(make):
    one, large, after, other = make(3, peer="a"), make(7, peer="b"), make(1, peer="b"), make(2, peer="c")
    queue = filled([one, large, after, other])
    assert queue.batch(one, 8) == [one, other]
    queue.take([one, other])
    assert queue.batch(next(queue.leads(until=99)), 8) == [large, after]


def test_higher_priorities_lead_and_come_first_in_a_batch_of_several(make):
    low = [make(1, priority=2) for _ in range(3)]
    high = make(1, priority=1)
    elsewhere = make(1, "b", priority=1)
    queue = filled([*low, high, elsewhere])
    assert next(queue.leads(until=99)) is high
    assert queue.batch(high, 3) == [high, *low[:2]]
    assert queue.batch(low[0], 3) == [high, *low[:2]]


def test_the_newest_of_a_peer_is_of_its_lowest_priority(make):
    low, high, other = make(1, priority=2), make(1, priority=1), make(1, priority=2, peer="other")
    queue = filled([low, high, other])
    assert queue.newest("") is low
    assert queue.newest("other") is other
    assert {name: held.rows for name, held in queue.peers.items()} == {"": 2, "other": 1}


def cpu_seconds(make: Make, count: int, act: Callable[[Queue, list[Work]], None]) -> float:
    best = float("inf")
    for _ in range(3):
        works = [make(1, peer=str(number % 3)) for number in range(count)]
        queue = filled(works)
        start = time.thread_time()
        act(queue, works)
        best = min(best, time.thread_time() - start)
        assert len(queue) == 0
    return best


def cancel_from_the_back(queue: Queue, works: list[Work]) -> None:
    for work in reversed(works):
        queue.discard(work)


def cancel_every_other_first(queue: Queue, works: list[Work]) -> None:
    for work in (*works[1::2], *works[::2]):
        queue.discard(work)


def take_one_by_one(queue: Queue, works: list[Work]) -> None:
    while work := queue.oldest():
        queue.take(queue.batch(next(queue.leads(until=work.arrived)), 1))


@pytest.mark.parametrize("act", [cancel_from_the_back, cancel_every_other_first, take_one_by_one])
def test_emptying_a_full_queue_takes_time_in_proportion_to_what_it_holds(make, act):
    small, large = cpu_seconds(make, 1000, act), cpu_seconds(make, 16_000, act)
    assert large < 16 * small * 4  # one step as long as the queue would make it 16 times as much again
