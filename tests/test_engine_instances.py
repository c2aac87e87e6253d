"""How many instances answer more, on a machine whose clock is the test's; and where their threads compute."""

import itertools
import os
import threading
from collections import Counter

import numpy as np
import pytest
import torch

from layercast.server import processors
from layercast.server.engines.choice import Buckets
from layercast.server.engines.instances import Team, gain, part

BUCKETS = Buckets((1, 2, 4, 8, 16, 32))


class Machine:
    """Runs a batch for so many microseconds, by its rows; several at once for `together` times as long as one alone."""

    def __init__(self, one, several, together=1.0):
        self.one, self.several, self.together = one, several, together
        self.wall = 0.0
        self.runs: Counter[int] = Counter()

    def gain(self, count=2, buckets=BUCKETS):
        return gain(self.single, lambda inputs: None, self.at_once, count, self.batch, buckets, lambda: self.wall)

    def single(self, inputs):
        self.runs[len(inputs["x"])] += 1
        self.wall += self.one(len(inputs["x"])) / 1e6

    def at_once(self, run, inputs):
        run(inputs)
        self.wall += self.several(len(inputs["x"])) * self.together / 1e6

    @staticmethod
    def batch(rows, length):
        return {"x": np.empty((rows, length))}


def test_the_gain_is_in_rows_that_are_shared():
    assert Machine(lambda rows: 100 * rows, lambda rows: 100 * rows).gain() == pytest.approx(2)
    assert Machine(lambda rows: 100 * rows, lambda rows: 100 * rows, together=2).gain() == pytest.approx(1)
    assert Machine(lambda rows: 50 * rows, lambda rows: 100 * rows).gain(count=4) == pytest.approx(2)


def test_what_a_batch_costs_whatever_its_rows_is_paid_by_each():
    assert Machine(lambda rows: 1000 + rows, lambda rows: 1000 + rows).gain() == pytest.approx(1, abs=0.02)


def test_rows_that_cannot_be_shared_evenly_count_as_lost():
    found = Machine(lambda rows: 100 * rows, lambda rows: 100 * rows).gain(count=3, buckets=Buckets((8,)))
    assert found == pytest.approx(8 / 2 * 6 / 8)


def test_batches_with_too_few_rows_for_all_are_not_tried_and_slow_ones_only_once():
    machine = Machine(lambda rows: 10_000 * rows, lambda rows: 10_000 * rows)
    assert machine.gain() == pytest.approx(2)
    assert set(machine.runs) == {4}
    assert machine.wall < 1
    assert Machine(lambda rows: 1, lambda rows: 1).gain(count=32) == 0


@pytest.mark.parametrize(("together", "runs"), [(1.1, 12), (2, 4)])
def test_two_ways_that_take_nearly_as_long_are_timed_more_often(together, runs):
    machine = Machine(lambda rows: 10_000, lambda rows: 10_000, together)
    assert machine.gain(buckets=Buckets((4,))) == pytest.approx(1 / together)
    assert machine.runs[4] == runs


def test_what_fails_several_times_at_once_runs_once(caplog):
    def broken(rows: int) -> float:
        raise RuntimeError("not from two threads")

    assert Machine(lambda rows: 1, broken).gain() == 0
    assert "not from two threads" in caplog.text


SIZES = [(0, rows, rows > 2) for rows in BUCKETS.rows]


def shorter(alone, shared, sizes=SIZES):
    """Return what `part` says where a batch takes so many microseconds by its rows, and the rows that were run."""
    machine = Machine(alone, shared)
    found = part(
        machine.single, lambda inputs: machine.at_once(len, inputs), machine.batch, sizes, lambda: machine.wall
    )
    return found, set(machine.runs)


def test_a_batch_that_runs_alone_is_compared_where_it_would_run_elsewhere_and_is_else_the_same():
    assert shorter(lambda rows: 50 * rows, lambda rows: 100 * rows) == (pytest.approx(0.5 ** (4 / 6)), {4, 8, 16, 32})
    assert shorter(lambda rows: 1, lambda rows: 2, [(0, 1, False), (0, 2, False)]) == (1, set())


def test_of_slow_batches_alone_only_the_smallest_of_each_length_runs():
    sizes = [(length, rows, True) for length in (16, 64) for rows in (1, 2, 4)]
    found, ran = shorter(lambda rows: 9_000 * rows, lambda rows: 18_000 * rows, sizes)
    assert (found, ran) == (pytest.approx(0.5), {1, 2})


def test_of_a_slow_length_what_runs_on_the_same_engine_alone_does_not_stand_for_the_rest():
    sizes = [(0, 1, True), (0, 2, False), (0, 4, True)]
    found, ran = shorter(lambda rows: 15_000 * rows, lambda rows: 30_000 * rows, sizes)
    assert (found, ran) == (pytest.approx(0.5 ** (2 / 3)), {1})


def test_what_fails_alone_has_no_engine_for_it(caplog):
    def broken(rows: int) -> float:
        raise RuntimeError("no such size")

    assert shorter(broken, lambda rows: 100) == (1, {4})
    assert "no such size" in caplog.text


def test_a_team_runs_at_the_same_time_with_one_thread_each_and_passes_errors_on():
    meeting, threads = threading.Barrier(3), []

    def run(inputs):
        meeting.wait(20)
        threads.append((torch.get_num_threads(), np.float32(1e-40) * np.float32(1) == 0))
        return inputs

    def broken(inputs):
        raise ValueError("no such size")

    team = Team(3)
    try:
        team(run, {})
        assert threads == [(1, True)] * 3
        with pytest.raises(ValueError, match="no such size"):
            team(broken, {})
    finally:
        team.close()


def affinity(monkeypatch, processors_allowed, budget):
    monkeypatch.setattr(processors, "_ALL", sorted(processors_allowed))
    monkeypatch.setattr(processors, "cpu_budget", lambda: budget)
    monkeypatch.setattr(processors, "_models", itertools.count(4))


def test_instances_have_processors_of_their_own_where_all_are_this_processs(monkeypatch):
    affinity(monkeypatch, {2, 3, 5, 7}, 4)
    places = processors.Places(2, 2)
    assert [places.share(at) for at in (0, 1)] == [{2, 3}, {5, 7}]
    assert processors.Places(1, 5).share(0) == set(), "more instances than processors"
    assert processors.Places(1, 3).share(0) == set(), "one would be used by nobody"
    assert processors.Places(4, 1).share(0) == set(), "a single instance has all"
    affinity(monkeypatch, {2, 3, 5, 7}, 3)
    assert processors.Places(1, 4).share(0) == set(), "a quota of processors that others use too"


def test_the_first_instances_of_models_are_not_all_on_one_processor(monkeypatch):
    affinity(monkeypatch, {2, 3, 5, 7}, 4)
    models = [processors.Places(1, 4) for _ in range(4)]
    assert [places.share(0) for places in models] == [{2}, {3}, {5}, {7}]
    for places in models:
        assert set.union(*map(places.share, range(4))) == {2, 3, 5, 7}


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="only Linux has affinities")
def test_a_thread_keeps_to_its_processors_and_one_that_it_starts_may_leave_them():
    allowed, found = os.sched_getaffinity(0), []
    places = processors.Places(1, len(allowed))

    def started():
        processors.on_all()
        found.append(os.sched_getaffinity(0))

    def prepared():
        places.take(0)
        found.append((os.sched_getaffinity(0), torch.get_num_threads(), np.float32(1e-40) * np.float32(1) == 0))
        thread = threading.Thread(target=started)
        thread.start()
        thread.join()

    thread = threading.Thread(target=prepared)
    thread.start()
    thread.join()
    assert found == [(places.share(0) or allowed, 1, True), allowed]
    assert os.sched_getaffinity(0) == allowed


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="only Linux has affinities")
def test_a_thread_that_goes_on_elsewhere_may_still_run_on_all_its_processors(monkeypatch):
    allowed, set_to, real = os.sched_getaffinity(0), [], os.sched_setaffinity
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, own: (set_to.append(set(own)), real(pid, own)))
    for turn in range(len(allowed) + 1):
        processors.elsewhere(turn)
        assert os.sched_getaffinity(0) == allowed
    assert set_to[::2] == [{at} for at in (*sorted(allowed), min(allowed))]


def taken(places, at):
    """Return what a thread has that takes the place of instance `at`: processors, policy, and threads of torch."""
    found = []

    def prepared():
        places.take(at)
        found.extend([os.sched_getaffinity(0), os.sched_getscheduler(0), torch.get_num_threads()])

    thread = threading.Thread(target=prepared)
    thread.start()
    thread.join()
    return found


@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="only Linux has policies")
def test_threads_of_instances_put_no_other_aside_and_what_runs_alone_has_all_processors():
    allowed = os.sched_getaffinity(0)
    places = processors.Places(1, len(allowed))
    own = [taken(places, at) for at in range(len(allowed))]
    assert own == [[places.share(at) or allowed, os.SCHED_BATCH, 1] for at in range(len(allowed))]
    assert taken(places, len(allowed)) == [allowed, os.SCHED_BATCH, len(allowed)]
    assert taken(processors.Places(2, 1), 0) == [allowed, os.SCHED_BATCH, 2]
    assert taken(processors.Places(2, 3, cards=True), 1) == [allowed, os.SCHED_OTHER, 2], "those wait for their card"
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="only Linux has policies")
def test_a_policy_that_is_forbidden_or_was_chosen_for_the_server_stays(monkeypatch):
    def forbidden(*asked):
        raise PermissionError

    with monkeypatch.context() as patch:
        patch.setattr(os, "sched_setscheduler", forbidden)
        assert taken(processors.Places(2, 1), 0)[1:] == [os.SCHED_OTHER, 2]
    with monkeypatch.context() as patch:
        patch.delattr(os, "sched_setscheduler")  # another system
        assert taken(processors.Places(2, 1), 0)[1:] == [os.SCHED_OTHER, 2]
    with monkeypatch.context() as patch:
        patch.setattr(os, "sched_getscheduler", lambda pid: os.SCHED_IDLE)
        patch.setattr(os, "sched_setscheduler", lambda *asked: pytest.fail("the server's own was changed"))
        assert taken(processors.Places(2, 1), 0)[2] == 2


def test_small_numbers_are_themselves_again_after_a_load():
    with processors.denormals_are_zero():
        assert np.float32(1e-40) * np.float32(1) == 0
    assert np.float32(1e-40) * np.float32(1) != 0
