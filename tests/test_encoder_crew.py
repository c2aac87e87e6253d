"""Threads that share the rows of a batch in the kernel of the engine encoder, and the memory that they work in."""

import gc
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from encoder_bodies import LOWEST, check, post_norm, pre_norm, run, values_for, wanted

from layercast.server import compiled, kernels
from layercast.server.engines.encoder.library import Library
from layercast.server.engines.encoder.plan import Memory, Plan
from layercast.server.engines.native.kernel import Crew

PADDED = {"mask": "mask", "factor": "factor", "hidden": LOWEST}
GUARDED = Path(__file__).parent / "guarded_kernel.py"


@pytest.fixture(scope="module")
def library(kernels_folder) -> Library:
    path = kernels.best(kernels_folder / compiled.made_of() / kernels.FOLDER, "encoder")
    assert path is not None
    return Library(path)


def threads_now() -> set[str]:
    return set(os.listdir("/proc/self/task"))


def assert_ended(before: set[str]) -> None:
    """The kernel may list a thread that was joined for a moment."""
    end = time.monotonic() + 10
    while threads_now() - before:
        assert time.monotonic() < end, "threads are left"
        os.sched_yield()


@pytest.mark.parametrize("members", [2, 3])
@pytest.mark.parametrize("block", [post_norm, pre_norm])
def test_more_threads_give_the_same_bits(library, block, members):
    body = block(library.kernel.lanes, **PADDED)
    crew, memory = Crew(library.kernel, members), Memory()
    plan = Plan(library, body, 2 * library.kernel.lanes)
    for rows, length in ((1, 30), (2, 3), (3, 97), (5, 1), (64, 17), (9, 200), (7, 48), (300, 2)):
        values = values_for(body, rows, length)
        got = plan.run(values, crew, memory)
        np.testing.assert_array_equal(got, run(library, body, values), str((rows, length)))
        check(got, wanted(body, values))


def test_many_batches_in_a_row(library):
    """Helpers wake while a run begins, is at work, or is over already."""
    body = post_norm(library.kernel.lanes)
    plan, crew, memory = Plan(library, body, 2 * library.kernel.lanes), Crew(library.kernel, 3), Memory()
    batches = [values_for(body, rows, length) for rows in (1, 2, 3, 8) for length in (1, 5, 40)]
    want = [run(library, body, values) for values in batches]
    for turn in range(300):
        for values, expected in zip(batches, want, strict=True):
            np.testing.assert_array_equal(plan.run(values, crew, memory), expected, str(turn))


def test_threads_share_a_plan_and_a_crew(library):
    body = pre_norm(library.kernel.lanes, **PADDED)
    plan, crew = Plan(library, body, 2 * library.kernel.lanes), Crew(library.kernel, 2)
    batches = [values_for(body, rows, 23) for rows in (1, 4, 16, 40)]
    want = [run(library, body, values) for values in batches]
    wrong: list[int] = []
    start = threading.Barrier(len(batches))

    def repeat(at: int) -> None:
        memory = Memory()
        start.wait()
        for _ in range(60):
            if not np.array_equal(plan.run(batches[at], crew, memory), want[at]):
                wrong.append(at)

    threads = [threading.Thread(target=repeat, args=(at,)) for at in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_its_threads_end_with_it(library):
    before = threads_now()
    body = post_norm(library.kernel.lanes)
    values = values_for(body, 9, 12)
    for _ in range(20):
        crew = Crew(library.kernel, 4)
        assert len(threads_now() - before) >= 3
        Plan(library, body, 2 * library.kernel.lanes).run(values, crew, Memory())
        del crew
        gc.collect()
        assert_ended(before)
    alone = Crew(library.kernel, 1)
    assert not threads_now() - before
    del alone


def test_a_process_ends_while_a_crew_is_there(kernels_folder):
    """Python does not end the crew then: another thread may still compute."""
    path = kernels.best(kernels_folder / compiled.made_of() / kernels.FOLDER, "encoder")
    code = (
        "import sys; from pathlib import Path; from layercast.server.engines.native.kernel import Crew, Kernel; "
        "crew = Crew(Kernel(Path(sys.argv[1])), 3); print('made')"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "made\n", "")


def test_it_gives_small_numbers_back_to_python(library):
    """Inside, those below 1e-38 are zero; the thread that calls has them as before."""
    body = post_norm(library.kernel.lanes)
    run(library, body, values_for(body, 2, 9), crew=2)
    tiny = np.float32(1e-39)
    assert tiny * np.float32(1) == tiny > 0


@pytest.mark.parametrize("level", list(kernels.LEVELS))
@pytest.mark.parametrize("side", ["before", "behind"])
def test_it_reads_and_writes_nothing_beside_its_memory(kernels_folder, level, side):
    """In a process of its own, where such a page ends it."""
    if not kernels.LEVELS[level] <= kernels.instructions():
        pytest.skip(f"this processor can't run x86-64-{level}")
    path = kernels_folder / compiled.made_of() / kernels.FOLDER / f"encoder-{level}.so"
    done = subprocess.run([sys.executable, GUARDED, path, side], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


def test_such_a_page_ends_the_process():
    done = subprocess.run([sys.executable, GUARDED, "", "behind"], capture_output=True, text=True, timeout=60)
    assert done.returncode == -11, done.stderr
