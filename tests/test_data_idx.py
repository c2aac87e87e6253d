"""IDX files: every type, plain and compressed, and every way to be wrong (user reports O52)."""

import gzip
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from layercast.models.data import DataError
from layercast.models.data.idx import load_mnist, read_idx

TYPES = {0x08: "u1", 0x09: "i1", 0x0B: "i2", 0x0C: "i4", 0x0D: "f4", 0x0E: "f8"}


def idx(array: np.ndarray, code: int = 0x08) -> bytes:
    """The format written by hand from its description: magic, dimensions, values, all big-endian."""
    header = bytes([0, 0, code, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(array.dtype.newbyteorder(">")).tobytes()


@pytest.mark.parametrize("code", TYPES)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shape", [(5,), (2, 3), (2, 3, 4), (1, 2, 1, 3), (0, 28, 28)])
def test_every_type_is_read_in_native_byte_order(tmp_path: Path, code: int, packed: bool, shape: tuple[int, ...]):
    wanted = (np.arange(np.prod(shape)) * 7 - 3).astype(TYPES[code]).reshape(shape)
    content = idx(wanted, code)
    path = tmp_path / "file"
    path.write_bytes(gzip.compress(content) if packed else content)
    got = read_idx(path)
    assert got.dtype == np.dtype(TYPES[code])
    assert got.dtype.isnative
    np.testing.assert_array_equal(got, wanted)


WHOLE = idx(np.arange(24, dtype=np.uint8).reshape(2, 3, 4))
WRONG = {
    "empty": (b"", "an empty file"),
    "three bytes": (WHOLE[:3], "000008"),
    "not idx": (b"\x89PNG\r\n\x1a\n", "89504e47"),
    "unknown type": (b"\0\0\x0a\x01\0\0\0\0", "00000a01"),
    "rank 0": (b"\0\0\x08\0", "00000800"),
    "rank 255": (b"\0\0\x08\xff" + b"\0\0\0\1" * 255 + b"\0", "000008ff"),
    "header cut off": (WHOLE[:9], "want 12 bytes of dimensions for rank 3, got 5"),
    "body cut off": (WHOLE[:-1], r"shape \[2, 3, 4\], 24 bytes, but only 23 follow"),
    "no body": (WHOLE[:16], "24 bytes, but only 0 follow"),
    "too long": (WHOLE + b"!", "24 bytes, but more follow"),
    "count of 2**31": (
        b"\0\0\x08\x01" + struct.pack(">I", 1 << 31) + b"1234",
        "2,147,483,648 bytes, but only 4 follow",
    ),
    "product past 2**64": (b"\0\0\x0e\x03" + b"\xff" * 12 + b"1234", "but only 4 follow"),
    "no rows of huge size": (b"\0\0\x08\x04" + b"\0\0\0\0" + b"\xff" * 12, "shape"),
    "compressed twice": (gzip.compress(WHOLE), "1f8b0800; it is gzip-compressed twice"),
}


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize("case", WRONG)
def test_wrong_files_are_refused_in_one_line_without_big_allocations(tmp_path: Path, case: str, packed: bool):
    content, message = WRONG[case]
    if case == "compressed twice" or packed:
        content = gzip.compress(content)
    path = tmp_path / "t10k-images-idx3-ubyte"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=message) as caught:
            read_idx(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert str(caught.value).startswith("t10k-images-idx3-ubyte: ")
    assert "\n" not in str(caught.value)
    assert peak < 8 << 20


@pytest.mark.parametrize("damage", ["cut off", "trailing junk", "flipped byte", "header only"])
def test_damaged_gzip_is_refused(tmp_path: Path, damage: str):
    packed = bytearray(gzip.compress(idx(np.random.default_rng(0).integers(0, 256, 5000).astype(np.uint8))))
    if damage == "cut off":
        del packed[len(packed) // 2 :]
    elif damage == "trailing junk":
        packed += b"junk"
    elif damage == "flipped byte":
        packed[len(packed) // 2] ^= 0xFF
    else:
        del packed[10:]
    path = tmp_path / "file.gz"
    path.write_bytes(packed)
    with pytest.raises(DataError, match="gzip data is cut off or damaged"):
        read_idx(path)


def test_a_gzip_that_unpacks_to_more_than_its_header_says_is_not_unpacked_whole(tmp_path: Path):
    path = tmp_path / "bomb.gz"
    path.write_bytes(gzip.compress(WHOLE + bytes(64 << 20)))
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="more follow"):
            read_idx(path)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_a_missing_file_or_folder_is_named(tmp_path: Path):
    with pytest.raises(DataError, match="nothing: No such file"):
        read_idx(tmp_path / "nothing")
    with pytest.raises(DataError, match="Is a directory"):
        read_idx(tmp_path)


def write_mnist(directory: Path, packed: bool = False, **changes: np.ndarray) -> None:
    rng = np.random.default_rng(1)
    files = {
        "train-images-idx3-ubyte": rng.integers(0, 256, (6, 28, 28)).astype(np.uint8),
        "train-labels-idx1-ubyte": np.array([3, 1, 4, 1, 5, 9], np.uint8),
        "t10k-images-idx3-ubyte": rng.integers(0, 256, (2, 28, 28)).astype(np.uint8),
        "t10k-labels-idx1-ubyte": np.array([2, 6], np.uint8),
    }
    codes = {np.dtype(name): code for code, name in TYPES.items()}
    for name, array in {**files, **{key.replace("_", "-"): value for key, value in changes.items()}}.items():
        content = idx(array, codes[array.dtype])
        (directory / (f"{name}.gz" if packed else name)).write_bytes(gzip.compress(content) if packed else content)


@pytest.mark.parametrize("packed", [False, True])
def test_mnist_is_read_as_images_with_one_channel(tmp_path: Path, packed: bool):
    write_mnist(tmp_path, packed)
    data = load_mnist(tmp_path)
    assert data.train_inputs.shape == (6, 1, 28, 28)
    assert data.train_inputs.dtype == torch.uint8
    assert data.train_targets.tolist() == [3, 1, 4, 1, 5, 9]
    assert data.test_targets.tolist() == [2, 6]
    assert data.test_targets.dtype == torch.int64
    assert data.labels == tuple("0123456789")


def test_compressed_files_under_plain_names_are_read(tmp_path: Path):
    write_mnist(tmp_path)
    path = tmp_path / "t10k-labels-idx1-ubyte"
    path.write_bytes(gzip.compress(path.read_bytes()))
    assert load_mnist(tmp_path).test_targets.tolist() == [2, 6]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_labels_idx1_ubyte": np.zeros(5, np.uint8)}, "want as many images as labels, got 6 and 5"),
        ({"train_labels_idx1_ubyte": np.full(6, 10, np.uint8)}, "want labels 0 to 9, got 10"),
        ({"train_labels_idx1_ubyte": np.zeros(6, np.int32)}, "want unsigned bytes"),
        ({"t10k_images_idx3_ubyte": np.zeros((2, 28, 27), np.uint8)}, r"got \[2, 28, 27\]"),
        ({"t10k_images_idx3_ubyte": np.zeros((2, 784), np.uint8)}, r"got \[2, 784\]"),
        ({"t10k_images_idx3_ubyte": np.zeros((2, 28, 28), np.float32)}, "want unsigned bytes"),
        (
            {
                "t10k_images_idx3_ubyte": np.zeros((0, 28, 28), np.uint8),
                "t10k_labels_idx1_ubyte": np.zeros(0, np.uint8),
            },
            "got 0 and 0",
        ),
    ],
)
def test_files_that_do_not_belong_together_are_refused(tmp_path: Path, changes: dict[str, np.ndarray], message: str):
    write_mnist(tmp_path, **changes)
    with pytest.raises(DataError, match=message):
        load_mnist(tmp_path)


def test_swapped_images_and_labels_are_refused(tmp_path: Path):
    write_mnist(tmp_path)
    images, labels = tmp_path / "t10k-images-idx3-ubyte", tmp_path / "t10k-labels-idx1-ubyte"
    images.rename(tmp_path / "other")
    labels.rename(images)
    (tmp_path / "other").rename(labels)
    with pytest.raises(DataError, match="want images"):
        load_mnist(tmp_path)


def test_a_missing_part_is_named(tmp_path: Path):
    write_mnist(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match=r"no file t10k-labels-idx1-ubyte or t10k-labels-idx1-ubyte\.gz"):
        load_mnist(tmp_path)
