"""CIFAR-10's binary version."""

from pathlib import Path

import numpy as np
import pytest
import torch

from layercast.models.data import DataError
from layercast.models.data.cifar import load_cifar10, read_batch

NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def record(label: int, red: int, green: int, blue: int) -> bytes:
    """One image whose planes are of one colour each, but for a mark in row 2, column 5 of the green plane."""
    planes = [np.full((32, 32), value, np.uint8) for value in (red, green, blue)]
    planes[1][2, 5] = 255
    return bytes([label]) + b"".join(plane.tobytes() for plane in planes)


def write_cifar(directory: Path, batches: int = 2) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for number in range(1, batches + 1):
        (directory / f"data_batch_{number}.bin").write_bytes(record(number, number, 20, 30) * 2)
    (directory / "test_batch.bin").write_bytes(record(9, 7, 8, 9))
    (directory / "batches.meta.txt").write_text("\n".join(NAMES) + "\n\n")


@pytest.mark.parametrize("folder", [".", "cifar-10-batches-bin"])
def test_planes_rows_and_columns_are_where_the_format_says(tmp_path: Path, folder: str):
    write_cifar(tmp_path / folder, batches=5)
    data = load_cifar10(tmp_path)
    assert data.labels == tuple(NAMES)
    assert data.train_inputs.shape == (10, 3, 32, 32)
    assert data.train_inputs.dtype == torch.uint8
    assert data.train_targets.tolist() == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert data.train_inputs[4, :, 0, 0].tolist() == [3, 20, 30]
    assert data.test_targets.tolist() == [9]
    assert torch.nonzero(data.test_inputs == 255).tolist() == [[0, 1, 2, 5]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "want a multiple of 3073 bytes, got 0"),
        (record(1, 0, 0, 0)[:-1], "got 3,072; is the file cut off"),
        (record(10, 0, 0, 0), "want labels 0 to 9, got 10"),
        (b"\x1f\x8b" * 3073, "want labels 0 to 9"),
    ],
)
def test_wrong_batches_are_refused(tmp_path: Path, content: bytes, message: str):
    path = tmp_path / "data_batch_1.bin"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"data_batch_1.bin: .*{message}"):
        read_batch(path)


def test_a_huge_file_is_refused_unread(tmp_path: Path):
    path = tmp_path / "data_batch_1.bin"
    with path.open("wb") as file:
        file.truncate(3073 << 20)
    with pytest.raises(DataError, match="want at most"):
        read_batch(path)


@pytest.mark.parametrize("missing", ["data_batch_1.bin", "test_batch.bin", "batches.meta.txt"])
def test_a_missing_file_is_named(tmp_path: Path, missing: str):
    write_cifar(tmp_path, batches=1)
    (tmp_path / missing).unlink()
    with pytest.raises(DataError, match=missing.replace("_1", "_.*")):
        load_cifar10(tmp_path)


def test_too_few_class_names_are_refused(tmp_path: Path):
    write_cifar(tmp_path)
    (tmp_path / "batches.meta.txt").write_text("cat dog")
    with pytest.raises(DataError, match="want 10 class names, got 2"):
        load_cifar10(tmp_path)
