"""Where the zoo's data sets are published, and how their archives become the files that the readers want."""

import os
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

from layercast.models.data.dataset import DataError
from layercast.models.data.download import Remote, download

# The site of MNIST's authors no longer hands the files out; these two mirrors are those of TensorFlow and PyTorch.
_MNIST = ("https://storage.googleapis.com/cvdf-datasets/mnist/", "https://ossci-datasets.s3.amazonaws.com/mnist/")
_MOST_UNPACKED = 1 << 26
_CIFAR_FOLDER = "cifar-10-batches-bin"
_CIFAR_MEMBERS = (*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin", "batches.meta.txt")

Say = Callable[[str], None]


def _mnist(name: str, size: int, sha256: str) -> Remote:
    return Remote(name, tuple(mirror + name for mirror in _MNIST), size, sha256)


MNIST = (
    _mnist("train-images-idx3-ubyte.gz", 9912422, "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"),
    _mnist("train-labels-idx1-ubyte.gz", 28881, "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"),
    _mnist("t10k-images-idx3-ubyte.gz", 1648877, "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"),
    _mnist("t10k-labels-idx1-ubyte.gz", 4542, "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"),
)
CIFAR10 = Remote(
    "cifar-10-binary.tar.gz",
    ("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",),
    170052171,
    "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
)
SMS_SPAM = Remote(
    "sms+spam+collection.zip",
    ("https://archive.ics.uci.edu/static/public/228/sms+spam+collection.zip",),
    203415,
    "1587ea43e58e82b14ff1f5425c88e17f8496bfcdb67a583dbff9eefaf9963ce3",
)


def fetch(data: str, directory: Path, say: Say) -> None:
    """Put the files of `data` (`mnist`, `cifar10` or `sms_spam`) into `directory`, as far as they are missing.

    DataError when they cannot be had or are not what was published.
    """
    if data == "mnist":
        _fetch_mnist(directory, say)
    elif data == "cifar10":
        _fetch_cifar10(directory, say)
    elif data == "sms_spam":
        _fetch_sms_spam(directory, say)
    else:
        raise ValueError(f"no source for the data set {data!r}; known: mnist, cifar10, sms_spam")


def _fetch_mnist(directory: Path, say: Say) -> None:
    for remote in MNIST:
        if not (directory / remote.name).exists() and not (directory / remote.name.removesuffix(".gz")).exists():
            download(remote, directory, say)


def _fetch_cifar10(directory: Path, say: Say) -> None:
    if (directory / _CIFAR_FOLDER).is_dir() or any(directory.glob("data_batch_*.bin")):
        return
    archive = download(CIFAR10, directory, say)
    staged = directory / f".{_CIFAR_FOLDER}.partial"
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir()
    with tarfile.open(archive) as packed:
        for name in _CIFAR_MEMBERS:
            try:
                member = packed.extractfile(f"{_CIFAR_FOLDER}/{name}")
            except KeyError:
                member = None
            if member is None:
                raise DataError(f"{archive.name}: want a file {_CIFAR_FOLDER}/{name} in it, got none")
            _write(member, staged / name)
    os.replace(staged, directory / _CIFAR_FOLDER)
    archive.unlink()


def _fetch_sms_spam(directory: Path, say: Say) -> None:
    target = directory / "SMSSpamCollection"
    if target.exists():
        return
    archive = download(SMS_SPAM, directory, say)
    staged = target.with_name(f".{target.name}.partial")
    with zipfile.ZipFile(archive) as packed:
        try:
            member = packed.open(target.name)
        except KeyError as error:
            raise DataError(f"{archive.name}: want a file {target.name} in it, got none") from error
        with member:
            _write(member, staged)
    os.replace(staged, target)
    archive.unlink()


def _write(member: IO[bytes], path: Path) -> None:
    """Write one file of an archive, by our own name for it, so that no name in the archive can point elsewhere."""
    content = member.read(_MOST_UNPACKED + 1)
    if len(content) > _MOST_UNPACKED:
        raise DataError(f"{path.name}: unpacks to more than {_MOST_UNPACKED:,} bytes")
    path.write_bytes(content)
