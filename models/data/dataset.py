"""What a data set is once read: arrays with a training and a test part, and where it came from."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor


class DataError(ValueError):
    """A data file is missing or is not what it should be; the text names the file, what was wanted and what came."""


@dataclass(frozen=True)
class Dataset:
    """A read data set. Inputs are uint8 images [N, C, H, W] or int64 tokens [N, T]; targets are int64 [N]."""

    name: str
    licence: str
    source: str
    labels: tuple[str, ...]
    train_inputs: Tensor
    train_targets: Tensor
    test_inputs: Tensor
    test_targets: Tensor

    def fingerprint(self) -> str:
        """Return the SHA-256 of the training part, by which a checkpoint knows the data it belongs to."""
        digest = hashlib.sha256(repr((tuple(self.train_inputs.shape), self.labels)).encode())
        for tensor in (self.train_inputs, self.train_targets):
            digest.update(tensor.contiguous().numpy().data)
        return digest.hexdigest()


def read_whole(path: Path, most: int) -> bytes:
    """Return the content of a data file of at most `most` bytes; DataError when there is none or it is longer."""
    try:
        size = path.stat().st_size
        if size > most:
            raise DataError(f"{path.name}: want at most {most:,} bytes, got {size:,}; is this the right file?")
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path.name}: {error.strerror or error}") from error


def stratified(targets: Tensor, fraction: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Split row numbers into (kept, held out) with `fraction` of every class held out; both in ascending order.

    Of a class with two rows or more, at least one is held out and one kept. DataError when nothing would be held out.
    """
    held = []
    for label in torch.unique(targets):
        rows = torch.nonzero(targets == label).flatten()
        order = torch.randperm(len(rows), generator=generator)
        count = min(max(round(len(rows) * fraction), 1), len(rows) - 1)
        held.append(rows[order[:count]])
    if sum(map(len, held)) == 0:
        raise DataError(f"want at least two rows of some class to hold one out, got {len(targets)} rows in all")
    out = torch.cat(held).sort().values
    mask = torch.ones(len(targets), dtype=torch.bool)
    mask[out] = False
    return torch.nonzero(mask).flatten(), out
