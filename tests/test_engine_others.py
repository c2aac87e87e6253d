"""Whether others took the processors while engines were timed, by what the system says of its idle time."""

import os
from pathlib import Path

import pytest

from layercast.server.engines.others import Others
from layercast.server.engines.race import Instant

pytestmark = pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="only Linux has affinities")


@pytest.fixture(autouse=True)
def allowed(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 2})
    monkeypatch.setattr(os, "sysconf", lambda name: 100)


def says(root: Path, *idle: int) -> None:
    lines = [f"cpu{at} 900 0 900 {ticks} 7 0 0 0 0 0" for at, ticks in enumerate(idle)]
    (root / "proc").mkdir(exist_ok=True)
    (root / "proc/stat").write_text("\n".join(["cpu  1 2 3 4 5 6 7 8 9 0", *lines, "ctxt 3"]))


def busy(root: Path, seconds: float, own: float, *idle: int) -> bool:
    """Tell what is found after so many seconds, in which this process worked, and each processor idled for ticks."""
    says(root, 5, 5, 5, 5)
    instants = iter([Instant(10.0, 3.0), Instant(10.0 + seconds, 3.0 + own)])
    others = Others(root, lambda: next(instants))
    says(root, *(5 + ticks for ticks in idle))
    return others.are_busy(2)


@pytest.mark.parametrize(
    ("own", "idle", "wanted"),
    [
        (1.2, (0, 80, 0, 0), False),  # what this process left was free
        (1.9, (0, 5, 5, 0), False),
        (1.0, (0, 0, 0, 0), True),  # it had one of two
        (0.6, (200, 10, 30, 200), True),  # what others than its own had is nothing to it
        (0.2, (0, 90, 90, 0), False),
    ],
)
def test_processors_are_busy_that_this_process_neither_used_nor_could_have(tmp_path, own, idle, wanted):
    assert busy(tmp_path, 1.0, own, *idle) == wanted


def test_what_is_too_short_to_tell_or_said_nowhere_is_not_busy(tmp_path):
    assert not busy(tmp_path, 0.05, 0.0, 0, 0, 0, 0)
    instants = iter([Instant(10.0, 3.0), Instant(11.0, 4.0)])
    (tmp_path / "proc/stat").write_text("cpu1 0 0 0 0 0 0\ncpu2 0 0 0 0 0 0\n")
    assert not Others(tmp_path, lambda: next(instants)).are_busy(2)
    (tmp_path / "proc/stat").write_text("intr 5\ncpu1\n")
    assert not Others(tmp_path).are_busy(2)
    assert not Others(tmp_path / "nowhere").are_busy(2)
