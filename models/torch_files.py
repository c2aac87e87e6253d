"""Files that torch.save wrote. The one place that reads them: tensors and plain values only, with no way round it."""

import pickle
import re
from pathlib import Path
from typing import Any, BinaryIO

import torch


class TorchFileError(ValueError):
    """A file is damaged, or holds more than tensors and plain values; the text names the file and says which."""


def load(path: Path, device: str | None = None) -> Any:
    """Return what `path` holds, its tensors on `device` (where they were for None). Code in the file never runs.

    TorchFileError for a file that is damaged or needs more than `weights_only`; OSError where it cannot be read.
    """
    with path.open("rb") as file:
        return read(file, str(path), device)


def read(file: BinaryIO, path: str, device: str | None = None) -> Any:
    """Return what an open file holds, as `load` does; `path` is named in errors."""
    try:
        return torch.load(file, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        raise TorchFileError(f"{path}: {_reason(str(error))}") from error
    except Exception as error:  # a damaged file makes the reader fail in many ways
        first = next(iter(str(error).splitlines()), "")[:200]
        raise TorchFileError(f"{path}: no file of torch.save, or a damaged one: {type(error).__name__}: {first}") from (
            error
        )


def _reason(text: str) -> str:
    """Return torch's page of advice, much of it on how to load the file all the same, as a reason and the safe fix."""
    named = re.search(r"(?:GLOBAL|global:?|class) +'?([\w.]+\.[\w]+)", text)
    if named is None:
        return "no file of torch.save, or one that holds more than tensors and plain values"
    return (
        f"it needs {named[1]} to be read, and such a file can run any code, so only tensors and plain values are "
        f"loaded; save the state dict alone, torch.save(model.state_dict(), FILE), or write safetensors"
    )
