"""Where an artefact is written before it is whole, and how it takes its place."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from layercast.models.export.checks import ExportError


def refuse_existing(directory: Path, force: bool) -> None:
    """Raise ExportError if `directory` exists and may not be replaced."""
    if directory.exists() and not force:
        raise ExportError(f"{directory} exists already; choose another version or pass --force to replace it")


@contextmanager
def staged(directory: Path, force: bool) -> Iterator[Path]:
    """Yield an empty directory beside `directory` that takes its place when the block ends without an error."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        stage.chmod(0o777 & ~_umask())  # mkdtemp's are private, but a server may run as another user
        yield stage
        if force and directory.exists():
            _replace(stage, directory)
        else:
            _take_place(stage, directory)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _replace(stage: Path, directory: Path) -> None:
    """Put `stage` where `directory` is, which steps aside first: a directory cannot be renamed over a full one."""
    aside = Path(tempfile.mkdtemp(prefix=f".{directory.name}-old-", dir=directory.parent))
    old = aside / directory.name
    try:
        with suppress(FileNotFoundError):  # another process replaces it too
            directory.rename(old)
        try:
            _take_place(stage, directory)
        except BaseException:
            if old.exists() and not directory.exists():
                old.rename(directory)
            raise
    finally:
        shutil.rmtree(aside)


def _take_place(stage: Path, directory: Path) -> None:
    try:
        stage.rename(directory)
    except OSError as error:
        if directory.exists():
            raise ExportError(f"{directory} was written by another process meanwhile") from error
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
