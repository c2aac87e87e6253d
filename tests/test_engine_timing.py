"""The choice of engines from what is measured, on a machine whose clock is the test's."""

import math
import random
from collections import Counter
from collections.abc import Callable, Collection, Mapping

import numpy as np
import pytest

from layercast.models.manifest import TensorSpec
from layercast.server.engines.choice import Buckets, Candidate, Choice
from layercast.server.engines.race import Instant
from layercast.server.engines.timing import fastest

ONE, TWO = Candidate("onnx", 1), Candidate("onnx", 2)
SCRIPT, EAGER = Candidate("torchscript", 2), Candidate("eager", 2)
BUCKETS = Buckets((1, 2, 4, 8, 16, 32, 64))
Cost = Callable[[int, int], tuple[float, float]]
"""Microseconds of wall clock and of processors' time, by rows and length."""


class Machine:
    """Runs engines that take the time they are told, and counts the runs."""

    def __init__(self, costs: Mapping[Candidate, Cost]) -> None:
        self.costs = costs
        self.wall = self.cpu = 0.0
        self.runs: Counter[tuple[Candidate, int, int]] = Counter()

    def choose(self, buckets: Buckets = BUCKETS, processors: int = 2, here: Collection[Candidate] = ()) -> Choice:
        engines = {candidate: self.engine(candidate) for candidate in self.costs}
        return fastest(engines, self.batch, buckets, processors, here, lambda: Instant(self.wall, self.cpu))[0]

    def engine(self, candidate: Candidate):
        def run(inputs):
            rows, length = inputs["x"].shape
            self.runs[candidate, rows, length] += 1
            wall, cpu = self.costs[candidate](rows, length)
            self.wall += wall / 1e6
            self.cpu += cpu / 1e6
            return {}

        return run

    @staticmethod
    def batch(rows: int, length: int):
        return {"x": np.empty((rows, length))}


def linear(start: float, row: float, threads: int = 1) -> Cost:
    """`start` microseconds in one thread, and `row` for each row, spread evenly over the threads."""
    return lambda rows, length: (start + row * rows / threads, start + row * rows)


def test_small_and_large_batches_may_run_on_different_engines():
    choice = Machine({ONE: linear(20, 50), SCRIPT: linear(200, 30)}).choose()
    assert str(choice) == "onnx (1 thread) 1-8 rows, torchscript (2 threads) 9-64 rows"
    assert set(choice.used) == {ONE, SCRIPT}


def test_one_that_is_best_everywhere_runs_everything():
    choice = Machine({EAGER: linear(200, 9), ONE: linear(20, 5), SCRIPT: linear(100, 8)}).choose()
    assert (str(choice), choice.used) == ("onnx (1 thread)", [ONE])


def test_an_engine_that_gains_little_is_not_worth_its_memory():
    assert Machine({ONE: linear(100, 10), SCRIPT: linear(95, 10.3)}).choose().used == [SCRIPT]


@pytest.mark.parametrize(
    ("small", "used"),
    [
        # Waking another thread costs what the batch does: it gains a tenth, and takes twice the processors' time.
        (lambda rows, length: (45 + rows, 100 + 2 * rows), [ONE]),
        (lambda rows, length: (25 + rows / 2, 50 + rows), [TWO]),
    ],
)
def test_processors_time_counts_beside_the_duration(small, used):
    assert Machine({ONE: linear(50, 1), TWO: small}).choose().used == used


@pytest.mark.parametrize(("here", "used"), [((ONE, TWO), [TWO]), ((SCRIPT,), [ONE]), ((), [ONE])])
def test_the_duration_of_what_runs_on_the_event_loop_counts_for_more(here, used):
    machine = Machine({ONE: linear(0, 30), TWO: lambda rows, length: (22 * rows, 44 * rows)})
    assert machine.choose(here=here).used == used


def test_batches_that_are_too_long_for_the_event_loop_are_judged_as_any_other():
    machine = Machine({ONE: linear(0, 9000), TWO: lambda rows, length: (6600 * rows, 13_200 * rows)})
    assert machine.choose(here=(ONE, TWO)).used == [ONE]


def test_readings_that_others_spoil_change_nothing():
    noise = random.Random(1)

    def disturbed(cost: Cost) -> Cost:
        def taken(rows: int, length: int) -> tuple[float, float]:
            wall, cpu = cost(rows, length)
            return wall * (1 + noise.random() * 5 * (noise.random() < 0.3)), cpu

        return taken

    quiet = {ONE: linear(20, 20), TWO: linear(62, 20, threads=2), SCRIPT: linear(300, 21, threads=2)}
    wanted = Machine(quiet).choose()
    for _ in range(20):
        assert Machine({candidate: disturbed(cost) for candidate, cost in quiet.items()}).choose() == wanted


def test_on_a_machine_that_is_busy_throughout_long_batches_are_judged_by_processors_time():
    def busy(cost: Cost, factor: float) -> Cost:
        return lambda rows, length: (cost(rows, length)[0] * factor, cost(rows, length)[1])

    # Two threads find no second processor: they take three times as long as they will when the machine is quiet.
    costs = {ONE: busy(linear(50, 3000), 1.5), TWO: busy(linear(60, 3100, threads=2), 3)}
    assert Machine(costs).choose().used == [TWO]


def test_threads_that_spin_in_vain_on_a_busy_machine_are_judged_by_what_one_works():
    alone: Cost = lambda rows, length: (4500 * rows, 3000 * rows)  # noqa: E731
    machine = Machine({ONE: alone, TWO: lambda rows, length: (5000 * rows, 8000 * rows)})
    assert machine.choose().used == [TWO]


def test_the_time_of_slow_batches_is_bounded():
    machine = Machine({ONE: linear(0, 15_000), EAGER: linear(0, 40_000)})
    assert machine.choose().used == [ONE]
    assert {rows for _, rows, _ in machine.runs} == {1, 2}
    assert machine.wall < 1
    assert machine.runs[EAGER, 1, 0] <= 4


def test_time_goes_to_those_that_are_close_and_not_to_those_that_cannot_win():
    machine = Machine({ONE: linear(400, 0), TWO: linear(380, 0), SCRIPT: linear(700, 0), EAGER: linear(2000, 0)})
    machine.choose()
    runs = {candidate: machine.runs[candidate, 8, 0] for candidate in machine.costs}
    assert runs[EAGER] < 4 < runs[SCRIPT] < 15
    assert runs[ONE] == runs[TWO] >= 30
    alone = Machine({ONE: linear(400, 0), EAGER: linear(2000, 0)})
    alone.choose()
    assert alone.runs[ONE, 8, 0] == 4, "nothing is left to tell apart"


def test_threads_that_wait_for_each_other_in_half_of_the_runs_are_judged_by_the_others():
    noise = random.Random(2)

    def stumbling(rows: int, length: int) -> tuple[float, float]:
        # Now and then both are put on one processor, where each spins until the other's turn.
        wall, cpu = linear(50, 6, threads=2)(rows, length)
        return (wall + 1500, cpu + 1500) if noise.random() < 0.5 else (wall, cpu)

    quiet = Machine({ONE: linear(20, 7), TWO: linear(50, 6, threads=2)}).choose()
    assert TWO in quiet.used
    for _ in range(20):
        assert Machine({ONE: linear(20, 7), TWO: stumbling}).choose() == quiet


def test_lengths_have_choices_of_their_own():
    buckets = Buckets((1, 2, 4), (16, 64, 192))
    quadratic: Cost = lambda rows, length: (10 + rows * length**2 / 10,) * 2  # noqa: E731
    machine = Machine({ONE: quadratic, SCRIPT: lambda rows, length: (300 + rows * length,) * 2})
    choice = machine.choose(buckets)
    assert choice.cells == ((ONE,) * 3, (SCRIPT,) * 3, (SCRIPT,) * 3)
    assert str(choice) == "up to 16 long: onnx (1 thread) 1-4 rows; longer: torchscript (2 threads) 1-4 rows"


@pytest.mark.parametrize("broken", [lambda rows: rows == 1, lambda rows: rows > 8, lambda rows: True])
def test_an_engine_is_not_chosen_for_batches_that_it_fails_on(broken, caplog):
    def failing(rows: int, length: int) -> tuple[float, float]:
        if broken(rows):
            raise RuntimeError("no such size")
        return 1.0, 1.0

    choice = Machine({SCRIPT: failing, ONE: linear(50, 50)}).choose()
    for rows, candidate in zip(BUCKETS.rows, choice.cells[0], strict=True):
        assert candidate == (ONE if broken(rows) else SCRIPT)
    assert "torchscript (2 threads) fails at" in caplog.text


def test_where_nothing_can_be_timed_the_likeliest_runs_everything(caplog):
    def impossible(rows: int, length: int):
        raise ValueError("a model cannot take BYTES")

    runs = {ONE: lambda inputs: {}, EAGER: lambda inputs: {}}
    assert fastest(runs, impossible, BUCKETS, 2)[0].used == [ONE]
    assert "a model cannot take BYTES" in caplog.text


@pytest.mark.parametrize("most", [1, 2, 3, 48, 64, 65_536])
def test_every_batch_has_a_bucket_and_the_largest_is_the_last(most):
    rows = Buckets.of([TensorSpec(name="x", datatype="FP32", shape=(-1, 10))], most).rows
    assert rows[-1] == most
    assert list(rows) == sorted(set(rows))
    assert len(rows) == 1 + math.ceil(math.log2(most))


@pytest.mark.parametrize(
    ("longest", "lengths"), [(None, (16, 64, 256)), (192, (16, 64, 192)), (20, (16, 20)), (8, (8,))]
)
def test_lengths_are_a_few_up_to_the_longest(longest, lengths):
    tokens = TensorSpec(name="tokens", datatype="INT64", shape=(-1, -1), pad=0, max_length=longest)
    assert Buckets.of([tokens], 4).lengths == lengths
