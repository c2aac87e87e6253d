"""Downloads that are checked by size and SHA-256, go on where they broke off, and never leave half a file in place."""

import hashlib
import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from layercast.models.data.dataset import DataError

_CHUNK = 1 << 18
_ATTEMPTS = 4
"""Tries an address: a broken connection is common, and every try goes on where the last one ended."""


@dataclass(frozen=True)
class Remote:
    """A file with known content: its name, the addresses that have it, its size in bytes and its SHA-256."""

    name: str
    urls: Sequence[str]
    size: int
    sha256: str


def download(remote: Remote, directory: Path, say: Callable[[str], None], timeout: float = 30.0) -> Path:
    """Return the path of `remote` in `directory`, fetching it unless it is there; DataError when no address has it.

    What arrives is kept in NAME.partial, so that a later call goes on from there, and renamed once size and hash are
    right. A file already there is left alone when it is right and refused when not: it may be the user's own.
    `timeout` bounds, in seconds, every single wait for the network.
    """
    directory.mkdir(parents=True, exist_ok=True)
    target = directory / remote.name
    if target.exists():
        if _is_right(target, remote):
            return target
        raise DataError(f"{target} is there but isn't the published file; move it away to download it")
    partial = target.with_name(f"{remote.name}.partial")
    problems = []
    for url in remote.urls:
        say(f"fetching {url} ({remote.size:,} bytes)")
        problem = _complete(url, remote, partial, timeout)
        if problem is None:
            os.replace(partial, target)
            return target
        problems.append(f"{url}: {problem}")
    raise DataError("; ".join(problems))


def _complete(url: str, remote: Remote, partial: Path, timeout: float) -> str | None:
    """Make `partial` the whole, right file; return what went wrong when no attempt succeeds, else None."""
    problem = None
    for _ in range(_ATTEMPTS):
        try:
            problem = _attempt(url, remote, partial, timeout)
        except urllib.error.HTTPError as error:
            problem = f"the server answered {error.code} {' '.join(str(error.reason).split())}"
            error.close()
            if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                # The server's file is shorter than what we hold, so ours is not a part of it.
                partial.unlink(missing_ok=True)
            elif error.code < http.HTTPStatus.INTERNAL_SERVER_ERROR:
                return problem  # asking again would not change "not found" or "forbidden"
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
            problem = f"{getattr(error, 'reason', error) or type(error).__name__}"
        if problem is None:
            return None
    return problem


def _attempt(url: str, remote: Remote, partial: Path, timeout: float) -> str | None:
    """Fetch what `partial` lacks; return what is wrong with the outcome, or None when it is the whole, right file."""
    have = partial.stat().st_size if partial.exists() else 0
    if have < remote.size:
        _fetch(url, remote, partial, have, timeout)
    got = partial.stat().st_size
    if got < remote.size:
        return f"the connection ended after {got:,} of {remote.size:,} bytes"
    if _is_right(partial, remote):
        return None
    partial.unlink()
    return f"what came isn't the published file (want {remote.size:,} bytes with SHA-256 {remote.sha256})"


def _fetch(url: str, remote: Remote, partial: Path, have: int, timeout: float) -> None:
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=timeout) as response:
        # Only an answer that says it starts where ours ends may be appended; any other is the file from its beginning.
        resumed = response.status == http.HTTPStatus.PARTIAL_CONTENT and (
            response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        )
        with partial.open("ab" if resumed else "wb") as file:
            _copy(response, file, remote.size - (have if resumed else 0))
            file.flush()
            os.fsync(file.fileno())


def _copy(response: http.client.HTTPResponse, file: BinaryIO, wanted: int) -> None:
    """Write at most one byte more than `wanted`: enough to notice a file that is too long."""
    left = wanted + 1
    while left > 0 and (piece := response.read(min(_CHUNK, left))):
        file.write(piece)
        left -= len(piece)


def _is_right(path: Path, remote: Remote) -> bool:
    if path.stat().st_size != remote.size:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == remote.sha256
