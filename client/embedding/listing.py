"""Which files of a directory are inputs, in which order, and what each holds."""

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from stat import S_ISREG

from layercast.client.errors import InputError
from layercast.client.pictures import PictureSpec
from layercast.client.preprocess import kind_of, prepare, tokens
from layercast.client.types import ModelMetadata
from layercast.proto.codec import AnyArray

_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_ENDINGS: dict[str | None, tuple[str, ...]] = {
    "image": (*_PICTURES, ".npy"),
    "text": (".txt", ".npy"),
    None: (".npy",),
}


@dataclass(frozen=True, slots=True)
class Entry:
    """A file: its path from the directory, with slashes, its size in bytes and when it changed, in nanoseconds."""

    path: str
    size: int
    time: int


@dataclass(slots=True)
class Listing:
    """The inputs, sorted by path, and how many files of other endings there are beside them."""

    entries: list[Entry] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)


def endings(metadata: ModelMetadata) -> tuple[str, ...]:
    """The endings of files that can be an input of the model.

    Raises InputError for a model that no file suits, once and not for every file.
    """
    kind = kind_of(metadata)
    if kind == "image":
        PictureSpec.parse(metadata.preprocessing or {})
    elif kind == "text":
        tokens(["x"], metadata.preprocessing or {})
    return _ENDINGS[kind]


def listing(directory: Path, wanted: tuple[str, ...]) -> Listing:
    """Every file below the directory whose ending is wanted, but for hidden ones.

    Links to files are followed, links to directories are not. Raises InputError for a directory that can't be read:
    its files would be missing without a word.
    """

    def refuse(error: OSError) -> None:
        raise InputError(f"{error.filename}: {error.strerror}") from error

    found = Listing()
    for folder, folders, names in os.walk(directory, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if name.startswith("."):
                continue
            path = Path(folder, name)
            if path.suffix.lower() not in wanted:
                found.left_out[path.suffix.lower() or "none"] += 1
            elif (entry := _entry(path, directory)) is not None:
                found.entries.append(entry)
    found.entries.sort(key=lambda entry: entry.path)
    return found


def _entry(path: Path, directory: Path) -> Entry | None:
    relative = path.relative_to(directory).as_posix()
    try:
        about = path.stat()
    except OSError:
        return Entry(relative, -1, 0)  # listed with the reason when it is read
    return Entry(relative, about.st_size, about.st_mtime_ns) if S_ISREG(about.st_mode) else None


def row_of(directory: Path, entry: Entry, metadata: ModelMetadata) -> AnyArray:
    """What the file holds as one row of the model's input, [1, …]. Raises InputError for a file that can't be used."""
    try:
        entry.path.encode()
    except UnicodeEncodeError as error:
        raise InputError("its name is not UTF-8") from error
    try:
        content = (directory / entry.path).read_bytes()
    except OSError as error:
        raise InputError(error.strerror or "it can't be read") from error
    if entry.path.lower().endswith(".txt"):
        text = content.decode("utf-8", "surrogateescape").rstrip("\r\n")
        return tokens([text], metadata.preprocessing or {})
    row = prepare([content], metadata)
    if len(row) != 1:
        raise InputError(f"it holds {len(row)} rows; a file stands for one")
    return row
