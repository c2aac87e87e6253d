"""Which processors the threads of a model's instances compute on."""

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

import torch

from layercast.server.environment import cpu_budget


def _allowed() -> list[int]:
    try:
        return sorted(os.sched_getaffinity(0))
    except AttributeError:  # only Linux has affinities
        return []


_ALL: Final = _allowed()
"""The processors of this process, before its threads have their own."""
_models: Final = itertools.count(os.getpid())
"""Another beginning for each model, and for each of several servers on one machine."""


def prepare(threads: int) -> None:
    """Let the calling thread compute with so many threads. See also `denormals_are_zero`."""
    torch.get_num_threads()  # a thread's first question, or forward, gives it the number that was set last anywhere
    torch.set_num_threads(threads)  # from then on each thread has its own
    torch.set_flush_denormal(True)


class Places:
    """The processors of one model's instances, each with `threads` threads.

    The system may put two instances on one processor, with the event loop or alone, while another is idle, and leave
    them there for milliseconds: a fifth of the processors' time was lost so. Each model begins with another processor,
    since of each the first instance is the busiest. Instances on `cards` have no processors of their own.
    """

    def __init__(self, threads: int, instances: int, cards: bool = False) -> None:
        self._threads = threads
        self._instances = instances
        self._cards = cards
        self._first = next(_models)

    def take(self, at: int) -> None:
        """Let the calling thread, that of the instance number `at`, compute on its own processors.

        The one after the last computes what runs alone: on those of all.
        """
        prepare(self._threads * (1 if at < self._instances else self._instances))
        if self._cards:
            return
        _wait_for_turns()
        if own := self.share(at):
            with suppress(OSError):  # forbidden here: it runs on all
                os.sched_setaffinity(0, own)

    def share(self, at: int) -> set[int]:
        """Return the processors of instance `at`; none where it has all, or they aren't this process's to divide.

        A quota is less than the processors that it is taken from, which others use: none of these is better than
        another.
        """
        threads, many = self._threads, self._instances
        if many == 1 or at >= many or cpu_budget() < len(_ALL) or threads * many != len(_ALL):
            return set()
        begin = (self._first + at) % many * threads
        return set(_ALL[begin : begin + threads])


def _wait_for_turns() -> None:
    """Let the calling thread, when it wakes, put no other aside: the event loop, say, which is soon done.

    Unlike one of lower priority it keeps its fair share of the processors.
    """
    with suppress(AttributeError, OSError):  # only Linux has it, and it may be forbidden
        if os.sched_getscheduler(0) == os.SCHED_OTHER:
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def on_all() -> None:
    """Let the calling thread run on every processor again: it has come from one with processors of its own."""
    if _ALL:
        with suppress(OSError):
            os.sched_setaffinity(0, _ALL)


def elsewhere(turn: int) -> None:
    """Let the calling thread go on on another of its processors; which one, `turn` says."""
    with suppress(AttributeError, OSError):  # only Linux has it, and it may be forbidden
        own = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {own[turn % len(own)]})
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
