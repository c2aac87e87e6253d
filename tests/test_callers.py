"""For how many requests others wait: by how many callers there are, and by how fast requests come."""

from types import SimpleNamespace

import pytest

from layercast.server.service import callers
from layercast.server.service.callers import Callers

TICK_NS = int(callers.TICK_SECONDS * 1e9)


class Load:
    """Callers who send a request `gap` µs after one another, each again once it is answered."""

    def __init__(self, monkeypatch, many: int, gap: int = 100) -> None:
        self.now = 10**9
        monkeypatch.setattr(callers, "time", SimpleNamespace(perf_counter_ns=lambda: self.now))
        self.callers = Callers()
        self.many, self.gap_ns = many, gap * 1000

    def batch(self) -> tuple[int, float]:
        """Let requests come until they are enough; return how many those are, and the ms that the first waited."""
        began, tick, waiting = self.now, self.now + TICK_NS, 0
        while True:
            if waiting < self.many:
                self.now += self.gap_ns
                while waiting and tick <= self.now:
                    if self.ticked(waiting):
                        return waiting, (self.now - began) / 1e6
                    tick += TICK_NS
                waiting += 1
                self.callers.came(waiting)
                if waiting == 1:
                    began, tick = self.now, self.now + TICK_NS
            else:
                self.now, tick = tick, tick + TICK_NS
                self.callers.ticked(waiting)
            if self.callers.enough(waiting):
                self.callers.ran(waiting)
                return waiting, (self.now - began) / 1e6

    def ticked(self, waiting: int) -> bool:
        self.callers.ticked(waiting)
        if self.callers.enough(waiting):
            self.callers.ran(waiting)
            return True
        return False

    def batches(self, many: int) -> list[tuple[int, float]]:
        return [self.batch() for _ in range(many)]


@pytest.fixture
def load(monkeypatch):
    return lambda *args, **options: Load(monkeypatch, *args, **options)


def test_who_is_alone_waits_for_nobody_but_seldom(load):
    waits = [wait for many, wait in load(1).batches(2000) if wait]
    assert 0 < len(waits) < 20
    assert max(waits) <= 2 * callers.TICK_SECONDS * 1000


@pytest.mark.parametrize("many", [2, 3, 4, 16, 64])
def test_three_quarters_of_the_callers_are_waited_for(load, many):
    seen = load(many)
    seen.batches(20)
    usual = -(-many * 3 // 4)
    sizes = [size for size, _ in seen.batches(100)]
    assert sizes.count(usual) > 90
    assert set(sizes) <= {usual, many}


def test_more_callers_are_found_after_a_while(load):
    seen = load(1)
    seen.batches(1000)
    seen.many = 16
    assert seen.batches(2 * callers._MOST)[-1][0] == 12


def test_callers_who_leave_are_waited_for_once(load):
    seen = load(16)
    seen.batches(1000)
    seen.many = 2
    found = seen.batches(3)
    assert found[0][0] == 2
    assert found[0][1] <= 2 * callers.TICK_SECONDS * 1000 + 1
    assert all(wait < 1 for _, wait in found[1:])


def test_requests_that_come_far_apart_do_not_wait(load):
    sizes = [size for size, _ in load(100, gap=1500).batches(1000)]
    assert sizes.count(1) > 980


def test_requests_that_come_without_end_wait_for_about_a_millisecond(load):
    found = load(10**6, gap=100).batches(1000)
    usual = sorted(found)[500]
    assert 8 <= usual[0] <= 12
    assert usual[1] <= 1.5


def test_where_no_more_have_room_a_part_of_those_is_waited_for():
    counted = Callers()
    while counted.enough(8):
        counted.came(1)
        counted.ran(1)
    counted.ran(8)  # the ninth would not fit
    assert counted.enough(6)
    assert not counted.enough(5)
