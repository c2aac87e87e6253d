"""What is known so far, beside the output: whole parts that survive a stop, and only those of the same job."""

import json
import math
import os
import shutil
import time
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

import numpy as np

from layercast.client.embedding.listing import Entry
from layercast.client.errors import InputError
from layercast.client.files import replacing, save_arrays
from layercast.proto.codec import AnyArray

_PART_ROWS = 1024
_PART_BYTES = 16 << 20
_PART_SECONDS = 10.0
_JOB = "job.json"


@dataclass(frozen=True, slots=True)
class Form:
    """What every row has in common."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]


def form_of(values: AnyArray) -> Form:
    """The form of rows, [N, …]."""
    return Form(values.shape[1:], values.dtype)


def other_form(path: str, form: Form, before: Form) -> InputError:
    """The error for a file whose row can't lie beside those of the files before it."""
    return InputError(
        f"{path} gives {list(form.shape)} of {form.dtype}, the files before it {list(before.shape)} of {before.dtype}: "
        "reduce the layer to one size, by @mean for example"
    )


class Parts:
    """Rows by file in a folder of parts. A row counts for a file only while its size and time are the same."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._index: dict[str, tuple[int, int, int, int]] = {}
        self._held: list[tuple[Entry, AnyArray]] = []
        self._bytes = 0
        self._flushed = time.monotonic()
        self._next = 0
        self.form: Form | None = None
        self._loaded = lru_cache(4)(self._load)

    @classmethod
    @contextmanager
    def opened(cls, folder: Path, job: Mapping[str, Any], restart: bool) -> Iterator[Self]:
        """The parts of `job` in the folder, for this process alone; none yet, or with `restart`, is an empty folder.

        Raises InputError for parts of another job, and while another process writes here.
        """
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise InputError(f"{folder}: {error.strerror}") from error
        with _locked(folder):
            if restart:
                for path in folder.glob("*.npz"):
                    path.unlink()
                (folder / _JOB).unlink(missing_ok=True)
            _check_job(folder, job)
            parts = cls(folder)
            parts._find()
            try:
                yield parts
            finally:
                if not parts._index:
                    parts.remove()

    def __contains__(self, entry: Entry) -> bool:
        return self._index.get(entry.path, ())[:2] == (entry.size, entry.time)

    def add(self, entries: Sequence[Entry], values: AnyArray) -> None:
        """Keep the rows of these files; written to disk by the part, after 10 s, and by `flush`.

        Raises InputError when they have another shape or type than the rows before.
        """
        form = form_of(values)
        if self.form is None:
            self.form = form
        if form != self.form:
            raise other_form(entries[0].path, form, self.form)
        self._held += zip(entries, values, strict=True)
        self._bytes += values.nbytes
        late = time.monotonic() - self._flushed > _PART_SECONDS
        if late or len(self._held) >= _PART_ROWS or self._bytes >= _PART_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what is held as a part."""
        if self._held:
            entries = [entry for entry, _ in self._held]
            arrays = {
                "paths": np.array([entry.path for entry in entries]),
                "sizes": np.array([entry.size for entry in entries], np.int64),
                "times": np.array([entry.time for entry in entries], np.int64),
                "values": np.stack([values for _, values in self._held]),
            }
            save_arrays(arrays, self._path(self._next))
            self._remember(entries, self._next)
            self._next += 1
            self._held, self._bytes = [], 0
        self._flushed = time.monotonic()

    def groups(self, entries: Sequence[Entry]) -> Iterator[tuple[list[str], AnyArray]]:
        """Paths and values in the order of `entries`, cut the same way wherever the parts were cut."""
        size = self._group_rows()
        for start in range(0, len(entries), size):
            group = entries[start : start + size]
            rows = []
            for entry in group:
                _, _, part, row = self._index[entry.path]
                rows.append(self._loaded(part)["values"][row])
            yield [entry.path for entry in group], np.stack(rows)

    def remove(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _group_rows(self) -> int:
        row_bytes = math.prod(self.form.shape) * self.form.dtype.itemsize if self.form else 0
        return max(min(_PART_ROWS, _PART_BYTES // max(row_bytes, 1)), 1)

    def _path(self, part: int) -> Path:
        return self._folder / f"{part:06}.npz"

    def _find(self) -> None:
        """Learn what is there. A part that can't be read, from a failing disk, is as good as none."""
        for path in sorted(self._folder.glob("*.npz")):
            if not path.stem.isdecimal():
                continue  # not ours
            part = int(path.stem)
            self._next = part + 1
            try:
                arrays = self._load(part)
                columns = (arrays["paths"].tolist(), arrays["sizes"].tolist(), arrays["times"].tolist())
                entries = [Entry(*each) for each in zip(*columns, strict=True)]
                self.form = form_of(arrays["values"])
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
                path.unlink()
                continue
            self._remember(entries, part)

    def _remember(self, entries: Sequence[Entry], part: int) -> None:
        for row, entry in enumerate(entries):
            self._index[entry.path] = (entry.size, entry.time, part, row)

    def _load(self, part: int) -> dict[str, AnyArray]:
        # Opened here: of a file that is no archive numpy would leave it open.
        with self._path(part).open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}


def _check_job(folder: Path, job: Mapping[str, Any]) -> None:
    path = folder / _JOB
    if not path.exists():
        with replacing(path) as file:
            file.write(json.dumps(job, indent=2).encode())
        return
    try:
        known = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} can't be read; begin anew with --restart") from error
    differing = [name for name in job if known.get(name) != job[name]]
    if differing:
        said = "; ".join(f"{name} {known.get(name)!r}, now {job[name]!r}" for name in differing)
        raise InputError(
            f"{folder} holds rows of another job ({said}), and rows of both in one file would not compare: finish that "
            "one (--version, --layer), name another --output, or begin anew with --restart"
        )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other processes out, where the system has such locks; a process that is killed lets go of its own."""
    try:
        import fcntl
    except ModuleNotFoundError:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(f"another process writes to {folder}; wait for it, or name another --output") from error
        yield
    finally:
        os.close(handle)
