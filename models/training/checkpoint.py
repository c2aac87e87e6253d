"""Checkpoints that are whole or absent: written beside, flushed, then renamed into place."""

import os
from pathlib import Path
from typing import Any

import torch

from layercast.models import torch_files


class CheckpointError(ValueError):
    """A checkpoint cannot be used: it is damaged, or belongs to other settings or data; the text says which."""


def save(state: dict[str, Any], path: Path) -> None:
    """Write `state` to `path`; a kill at any moment leaves the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with staged.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(staged, path)
    except BaseException:
        staged.unlink(missing_ok=True)
        raise
    _flush_names(path.parent)


def load(path: Path) -> dict[str, Any] | None:
    """Return the state in `path`, or None when there is no such file; CheckpointError when it is damaged.

    Tensors and plain values only, no code. What killed writers left beside it is removed.
    """
    for left_over in path.parent.glob(f".{path.name}.*.partial"):
        left_over.unlink(missing_ok=True)
    if not path.is_file():
        return None
    try:
        state = torch_files.load(path)
    except (torch_files.TorchFileError, OSError) as error:
        raise CheckpointError(f"{path} is no checkpoint of ours or is damaged; delete it or use --fresh") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: want a checkpoint of ours, got a {type(state).__name__}; use --fresh")
    return state


def _flush_names(directory: Path) -> None:
    """Make a rename in `directory` survive a power cut, where the system lets a directory be flushed."""
    if os.name != "posix":
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
