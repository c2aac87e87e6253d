"""Which processors the threads of a model's instances compute on."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch

from layercast.server.environment import cpu_budget


def prepare(threads: int, instances: int, on_card: bool, at: int) -> None:
    """Let the calling thread, that of the instance number `at`, compute with so many threads, on its own processors.

    The system may put two of them on one processor, with the event loop or alone, while another is idle, and leave
    them there for milliseconds: a fifth of the processors' time was lost so. See also `denormals_are_zero`.
    """
    torch.set_num_threads(threads)  # each thread has its own number
    torch.set_flush_denormal(True)
    if instances > 1 and not on_card and (own := share(threads, instances, at)):
        with suppress(OSError):  # forbidden here: it runs on all
            os.sched_setaffinity(0, own)


@contextmanager
def denormals_are_zero() -> Iterator[None]:
    """Let this thread, and those that it starts, take numbers below 1e-38 for zero.

    Attention gives many of them, and a processor computes far more slowly with them: up to half of a forward.
    """
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def share(threads: int, instances: int, at: int) -> set[int]:
    """Return the processors of instance `at`; none where they can't be said, or aren't this process's alone to divide.

    A quota is less than the processors that it is taken from, which others use: none of these is better than another.
    """
    try:
        allowed = sorted(os.sched_getaffinity(0))
    except AttributeError:  # only Linux has affinities
        return set()
    if cpu_budget() < len(allowed) or threads * instances > len(allowed):
        return set()
    return set(allowed[at * threads : (at + 1) * threads])
