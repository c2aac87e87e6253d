"""What a repository's folder holds now: `<root>/<model>/<version>/manifest.json` and the files that it lists.

Names are checked before they become paths, and links that lead out of the repository are not followed.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import stat
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from layercast.models.manifest import MANIFEST_FILE
from layercast.server.errors import StartError
from layercast.server.settings import MODEL_FILE

logger = logging.getLogger(__name__)

_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z")
_VERSION = re.compile(r"^[1-9][0-9]{0,17}\Z")


@dataclass(frozen=True)
class OnDisk:
    """A version's directory as it stands.

    `mark` changes whenever the manifest, a listed file or the model's settings file does. `lacking` says what keeps
    the directory from being whole; it is empty for a whole one.
    """

    number: int
    directory: Path
    mark: str
    lacking: str = ""
    begun: bool = True
    """Whether there is a manifest, which a copy may not have reached yet."""


def is_name(text: str) -> bool:
    """Tell whether `text` may name a model."""
    return bool(_NAME.match(text))


def is_version(text: str) -> bool:
    """Tell whether `text` is a version: a positive number without leading zeros."""
    return bool(_VERSION.match(text))


def models(root: Path) -> list[str]:
    """Return the names of the folders below `root` that may hold a model; StartError when `root` is no folder."""
    if not root.is_dir():
        raise StartError(
            f"the repository {str(root)!r} is not a folder; make one with `layercast export --all --output DIR`"
        )
    return sorted(entry.name for entry in root.iterdir() if is_name(entry.name) and _folder_inside(entry, root))


def versions(root: Path, model: str) -> list[OnDisk]:
    """Return the version directories of a model, also those that are not whole, by number; none for a wrong name."""
    folder = root / model
    if not is_name(model) or not _folder_inside(folder, root):
        return []
    settings = _content(folder / MODEL_FILE)
    numbers = sorted(int(entry.name) for entry in folder.iterdir() if is_version(entry.name))
    found = []
    for number in numbers:
        # A directory that is being replaced or removed may go away between two calls.
        with contextlib.suppress(FileNotFoundError):
            if _folder_inside(folder / str(number), root):
                found.append(_look(number, folder / str(number), root, settings))
    return found


def _folder_inside(folder: Path, root: Path) -> bool:
    if not folder.is_dir():
        return False
    if folder.resolve().is_relative_to(root.resolve()):
        return True
    _warn_of_link(folder)
    return False


@lru_cache(maxsize=256)  # once for each, however often it is looked at
def _warn_of_link(folder: Path) -> None:
    logger.warning("%s is left out: it is a link that leads out of the repository", folder)


def _look(number: int, directory: Path, root: Path, settings: bytes) -> OnDisk:
    """Look at one version's directory; OSError when it goes away meanwhile."""
    digest, listed = b"", None
    lacking = [_wrong(directory / MANIFEST_FILE, root, None)]
    if not lacking[0]:
        state = (directory / MANIFEST_FILE).stat()
        digest, listed = _manifest(directory / MANIFEST_FILE, state.st_ino, state.st_size, state.st_mtime_ns)
        if listed is None:
            lacking.append(f"{MANIFEST_FILE} is not JSON, or not written to its end")
    begun = bool(digest)
    lacking += [_wrong(directory / name, root, size) for name, size in listed or ()]
    mark = hashlib.sha256(digest + settings)
    for entry in sorted(os.scandir(directory), key=lambda entry: entry.name):
        state = entry.stat(follow_symlinks=False)
        mark.update(f"{entry.name!r} {state.st_size} {state.st_ino} {state.st_mtime_ns}\n".encode())
    return OnDisk(number, directory, mark.hexdigest(), "; ".join(filter(None, lacking)), begun)


def _wrong(path: Path, root: Path, size: int | None) -> str:
    """Return why `path` can't be read as a whole file of `size` bytes (None for any), or ""."""
    try:
        state = path.stat()
    except (OSError, ValueError):  # a name that no file can have is a ValueError
        return f"{path.name} is missing, so the version is still being copied or is no artefact"
    if not path.resolve().is_relative_to(root.resolve()):
        return f"{path.name} is a link that leads out of the repository"
    if not stat.S_ISREG(state.st_mode):
        return f"{path.name} is no regular file"
    return "" if size in (None, state.st_size) else f"{path.name} has {state.st_size} of {size} bytes"


@lru_cache(maxsize=4096)
def _manifest(path: Path, inode: int, size: int, modified: int) -> tuple[bytes, tuple[tuple[str, int], ...] | None]:
    """Return the manifest's digest, and the names and sizes of the files it lists; None when it is no JSON.

    The other arguments make a manifest that changed another one for the cache.
    """
    content = path.read_bytes()
    digest = hashlib.sha256(content).digest()
    try:
        manifest = json.loads(content)
    except (ValueError, RecursionError):
        return digest, None
    try:
        listed = [(str(name), int(entry["bytes"])) for name, entry in manifest["files"].items()]
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
        listed = []  # a load says what is wrong with it
    plain = [(name, size) for name, size in listed if name not in ("", ".", "..") and not set(name) & set("/\\\0")]
    return digest, tuple(plain)


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
