"""Checkpoints survive a kill at any byte: afterwards there is the old one or the new one, whole (A39)."""

import os
import random
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from layercast.models.training import checkpoint
from layercast.models.training.checkpoint import CheckpointError


def state(number: int) -> dict[str, object]:
    return {"number": number, "weights": torch.full((5000,), float(number)), "history": [{"epoch": number}]}


def check(loaded: dict[str, object] | None, *numbers: int) -> int:
    assert loaded is not None
    number = loaded["number"]
    assert number in numbers
    assert torch.equal(loaded["weights"], torch.full((5000,), float(number)))
    assert loaded["history"] == [{"epoch": number}]
    return number


def test_what_is_saved_is_loaded_and_nothing_else_is_left(tmp_path: Path):
    path = tmp_path / "deep" / "checkpoint.pt"
    assert checkpoint.load(path) is None
    checkpoint.save(state(1), path)
    checkpoint.save(state(2), path)
    check(checkpoint.load(path), 2)
    assert [left.name for left in path.parent.iterdir()] == ["checkpoint.pt"]


KILLED = textwrap.dedent("""
    import os, resource, signal, sys
    from pathlib import Path
    import torch
    from layercast.models.training import checkpoint

    path = Path(sys.argv[1])
    state = lambda n: {"number": n, "weights": torch.full((5000,), float(n)), "history": [{"epoch": n}]}
    checkpoint.save(state(0), path)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    print("size", path.stat().st_size, flush=True)
    for line in sys.stdin:
        number, limit = map(int, line.split())
        child = os.fork()
        if child == 0:
            # The kernel kills the process at the very byte that would pass the limit.
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            checkpoint.save(state(number), path)
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
""")


@pytest.mark.skipif(sys.platform != "linux", reason="kills by Linux's file size limit")
def test_a_kill_at_any_byte_of_a_save_leaves_the_old_checkpoint_or_the_new(tmp_path: Path):
    path = tmp_path / "checkpoint.pt"
    command = [sys.executable, "-c", KILLED, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as saver:
        assert saver.stdin is not None
        assert saver.stdout is not None
        size = int(saver.stdout.readline().split()[1])
        numbers = random.Random(0)
        limits = [0, 1, size - 1, size, size * 2] + [numbers.randrange(size) for _ in range(50)]
        kept = 0
        for number, limit in enumerate(limits, 1):
            saver.stdin.write(f"{number} {limit}\n")
            saver.stdin.flush()
            code = int(saver.stdout.readline())
            assert code == (0 if limit >= size else -signal.SIGXFSZ)
            kept = check(checkpoint.load(path), number if code == 0 else kept)
            assert [left.name for left in tmp_path.iterdir()] == ["checkpoint.pt"]
        saver.stdin.close()
    assert saver.returncode == 0
    assert kept == 5


@pytest.mark.parametrize("moment", ["replace", "fsync"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["disk", "ctrl-c"])
def test_a_failed_save_keeps_the_old_checkpoint_and_no_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, error: BaseException
):
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(state(1), path)

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(os, moment, fail)
    with pytest.raises(type(error)):
        checkpoint.save(state(2), path)
    monkeypatch.undo()
    assert [left.name for left in tmp_path.iterdir()] == ["checkpoint.pt"]
    check(checkpoint.load(path), 1)


@pytest.mark.parametrize("length", [0, 1, 100, 5000, -1])
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, length: int):
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(state(1), path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt is no checkpoint of ours or is damaged"):
        checkpoint.load(path)


class Harmful:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch harmed",)


def test_a_checkpoint_never_runs_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Harmful()}, tmp_path / "checkpoint.pt")
    with pytest.raises(CheckpointError, match="no checkpoint of ours"):
        checkpoint.load(tmp_path / "checkpoint.pt")
    assert not (tmp_path / "harmed").exists()


def test_another_kind_of_file_is_refused(tmp_path: Path):
    torch.save([1, 2], tmp_path / "checkpoint.pt")
    with pytest.raises(CheckpointError, match="got a list"):
        checkpoint.load(tmp_path / "checkpoint.pt")
