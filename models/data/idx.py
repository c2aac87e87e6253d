"""Reader of the IDX format in which MNIST is published (LeCun, Cortes, Burges), plain or gzip-compressed."""

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import torch
from numpy.typing import NDArray

from layercast.models.data.dataset import DataError, Dataset

_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_GZIP = b"\x1f\x8b"
_MOST_BYTES = 1 << 30
_MOST_DIMENSIONS = 32
_CHUNK = 1 << 20
_FILES = {
    "train_inputs": "train-images-idx3-ubyte",
    "train_targets": "train-labels-idx1-ubyte",
    "test_inputs": "t10k-images-idx3-ubyte",
    "test_targets": "t10k-labels-idx1-ubyte",
}


def read_idx(path: Path) -> NDArray[np.generic]:
    """Return the array in an IDX file, in native byte order.

    Gzip is recognised by content, not by name. Raises DataError naming the file, what was wanted and what came when
    the header is not IDX, or when the body is shorter or longer than the header says. Never allocates more than the
    file holds, whatever its header claims.
    """
    try:
        with path.open("rb") as file:
            compressed = file.read(2) == _GZIP
        with gzip.open(path) if compressed else path.open("rb") as stream:
            return _read(cast(BinaryIO, stream), path.name)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path.name}: the gzip data is cut off or damaged ({error}); download it again") from error
    except OSError as error:
        raise DataError(f"{path.name}: {error.strerror or error}") from error


def _read(stream: BinaryIO, name: str) -> NDArray[np.generic]:
    magic = stream.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] not in _TYPES or not 1 <= magic[3] <= _MOST_DIMENSIONS:
        hint = "; it is gzip-compressed twice" if magic[:2] == _GZIP else ""
        raise DataError(
            f"{name}: want an IDX file (two zero bytes, a type, a rank), got {magic.hex() or 'an empty file'}{hint}"
        )
    dtype, rank = np.dtype(_TYPES[magic[2]]), magic[3]
    dimensions = stream.read(4 * rank)
    if len(dimensions) < 4 * rank:
        raise DataError(f"{name}: want {4 * rank} bytes of dimensions for rank {rank}, got {len(dimensions)}")
    shape = struct.unpack(f">{rank}I", dimensions)
    # Python ints: a forged header must not overflow into a small allocation.
    wanted = math.prod(shape) * dtype.itemsize
    body = _read_at_most(stream, min(wanted, _MOST_BYTES) + 1)
    if len(body) != wanted:
        got = "more follow" if len(body) > wanted else f"only {len(body):,} follow"
        if len(body) > _MOST_BYTES:
            got = f"{_MOST_BYTES:,} are the most that is read"
        raise DataError(f"{name}: the header says shape {list(shape)}, {wanted:,} bytes, but {got}; download it again")
    try:
        return np.frombuffer(body, dtype).reshape(shape).astype(dtype.newbyteorder("="))
    except ValueError as error:  # dimensions like [0, 2**31, 2**31, 2**31] hold no bytes, but numpy refuses them
        raise DataError(f"{name}: the header says shape {list(shape)}: {error}") from error


def _read_at_most(stream: BinaryIO, size: int) -> bytearray:
    # In pieces: one read of a forged size would allocate all of it before the file turns out to be short.
    body = bytearray()
    while len(body) < size and (piece := stream.read(min(_CHUNK, size - len(body)))):
        body += piece
    return body


def load_mnist(directory: Path) -> Dataset:
    """Read MNIST's four IDX files, plain or `.gz`, from `directory`; images are uint8 [N, 1, 28, 28]."""
    arrays = {part: torch.from_numpy(read_idx(_find(directory, name))) for part, name in _FILES.items()}
    for part in ("train", "test"):
        images, labels = arrays[f"{part}_inputs"], arrays[f"{part}_targets"]
        pair = f"{_FILES[f'{part}_inputs']} and {_FILES[f'{part}_targets']}"
        if images.dtype != torch.uint8 or labels.dtype != torch.uint8:
            raise DataError(f"{pair}: want unsigned bytes, got {images.dtype} and {labels.dtype}")
        if images.dim() != 3 or images.shape[1:] != (28, 28) or labels.dim() != 1:
            raise DataError(
                f"{pair}: want images [N, 28, 28] and labels [N], got {list(images.shape)} and {list(labels.shape)}"
            )
        if len(images) != len(labels) or not len(images):
            raise DataError(f"{pair}: want as many images as labels, got {len(images):,} and {len(labels):,}")
        if int(labels.max()) > 9:
            raise DataError(f"{pair}: want labels 0 to 9, got {int(labels.max())}")
    return Dataset(
        name="MNIST",
        licence="CC BY-SA 3.0",
        source="LeCun, Cortes, Burges: The MNIST database of handwritten digits",
        labels=tuple(str(digit) for digit in range(10)),
        train_inputs=arrays["train_inputs"].unsqueeze(1),
        train_targets=arrays["train_targets"].long(),
        test_inputs=arrays["test_inputs"].unsqueeze(1),
        test_targets=arrays["test_targets"].long(),
    )


def _find(directory: Path, name: str) -> Path:
    for candidate in (directory / name, directory / f"{name}.gz"):
        if candidate.is_file():
            return candidate
    raise DataError(f"no file {name} or {name}.gz in the data directory {directory.name!r}")
