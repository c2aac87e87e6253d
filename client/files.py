"""Files that are whole or not there."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from layercast.client.errors import InputError
from layercast.proto.codec import AnyArray


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file beside `path` to write to, which takes its place at the end; a failure leaves what was there.

    Raises InputError for what the file system refuses.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise InputError(f"{path}: {error.strerror}") from error
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def save_arrays(arrays: Mapping[str, AnyArray], path: Path) -> None:
    """Write an .npz archive of the arrays by name."""
    named: dict[str, Any] = dict(arrays)
    with replacing(path) as file:
        np.savez(file, **named)
