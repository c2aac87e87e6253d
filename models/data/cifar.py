"""Reader of CIFAR-10's binary version (Krizhevsky 2009): records of one label byte and 3,072 pixel bytes."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from layercast.models.data.dataset import DataError, Dataset, read_whole

_RECORD = 1 + 3 * 32 * 32
_MOST_BYTES = 1 << 30
_ARCHIVE_FOLDER = "cifar-10-batches-bin"


def read_batch(path: Path) -> tuple[Tensor, Tensor]:
    """Return (images uint8 [N, 3, 32, 32], labels int64 [N]) of one batch file; DataError when it is not one."""
    content = read_whole(path, _MOST_BYTES)
    if not content or len(content) % _RECORD:
        raise DataError(f"{path.name}: want a multiple of {_RECORD} bytes, got {len(content):,}; is the file cut off?")
    records = torch.from_numpy(np.frombuffer(content, np.uint8).reshape(-1, _RECORD).copy())
    labels = records[:, 0].long()
    if int(labels.max()) > 9:
        raise DataError(f"{path.name}: want labels 0 to 9, got {int(labels.max())}; is this CIFAR-10's binary version?")
    return records[:, 1:].reshape(-1, 3, 32, 32), labels


def load_cifar10(directory: Path) -> Dataset:
    """Read every `data_batch_*.bin`, `test_batch.bin` and the names in `batches.meta.txt` from `directory`.

    The folder that the official archive unpacks to, `cifar-10-batches-bin`, is found below `directory` as well.
    """
    if (directory / _ARCHIVE_FOLDER).is_dir():
        directory = directory / _ARCHIVE_FOLDER
    batches = sorted(directory.glob("data_batch_*.bin"))
    if not batches:
        raise DataError(f"no file data_batch_*.bin in the data directory {directory.name!r}")
    labels = _names(directory / "batches.meta.txt")
    images, targets = zip(*(read_batch(path) for path in batches), strict=True)
    test_images, test_targets = read_batch(directory / "test_batch.bin")
    return Dataset(
        name="CIFAR-10",
        licence="free to use with the citation",
        source="Krizhevsky 2009: Learning Multiple Layers of Features from Tiny Images",
        labels=labels,
        train_inputs=torch.cat(images),
        train_targets=torch.cat(targets),
        test_inputs=test_images,
        test_targets=test_targets,
    )


def _names(path: Path) -> tuple[str, ...]:
    names = tuple(read_whole(path, 1 << 16).decode("utf-8", errors="replace").split())
    if len(names) != 10:
        raise DataError(f"{path.name}: want 10 class names, got {len(names)}")
    return names
