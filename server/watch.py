"""Watching a repository's folder: what is added, changed or removed there is loaded, swapped or dropped.

By looking every so often, which works on every file system. A version counts once its directory is whole and two looks
in a row saw the same; a directory that is being copied is waited for, and named when nothing more comes.
"""

import asyncio
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from layercast.server import disk
from layercast.server.disk import OnDisk
from layercast.server.errors import StartError
from layercast.server.repository import Repository

logger = logging.getLogger(__name__)

_PATIENCE: Final = 10
"""Looks without a change after which a directory that is not whole is no more waited for."""


@dataclass
class _Seen:
    mark: str
    looks: int = 0


class Watcher:
    """Looks at `root` every `seconds` and brings the repository to what is there."""

    def __init__(self, repository: Repository, root: Path, seconds: float) -> None:
        self._repository = repository
        self._root = root
        self._seconds = seconds
        self._seen: dict[tuple[str, int], _Seen] = {}
        self._gone: set[tuple[str, int]] = set()
        self._unreadable = False
        self.looks = 0

    async def run(self) -> None:
        """Look until cancelled. A folder that can't be read changes nothing: it may be mounted again."""
        while True:
            await asyncio.sleep(self._seconds)
            try:
                await self._look()
            except (OSError, StartError) as error:
                if not self._unreadable:
                    logger.error("the repository can't be watched, what serves goes on: %s", error)
                self._unreadable = True
            except Exception:
                logger.exception("a look at the repository failed; what serves goes on, and so does watching")
            else:
                self._unreadable = False
            self.looks += 1

    async def _look(self) -> None:
        found = await asyncio.to_thread(self._found)
        known = {version.name for version in self._repository.versions()}
        for name in sorted(known | found.keys()):
            versions = found.get(name, [])
            settled = [version for version in versions if self._settled(name, version)]
            absent = self._absent(name, {version.number for version in versions})
            leave = ({version.number for version in versions} | absent) - {version.number for version in settled}
            if self._differs(name, settled, leave):
                await self._repository.refresh(name, settled, leave)

    def _found(self) -> dict[str, list[OnDisk]]:
        found = {name: disk.versions(self._root, name) for name in disk.models(self._root)}
        return {name: versions for name, versions in found.items() if versions}

    def _settled(self, name: str, version: OnDisk) -> bool:
        """Whether a directory is as it was at the last look, and whole, or not whole for long."""
        seen = self._seen.get((name, version.number))
        if seen is None or seen.mark != version.mark:
            self._seen[name, version.number] = _Seen(version.mark)
            return False
        seen.looks += 1
        return seen.looks >= (_PATIENCE if version.lacking else 1)

    def _absent(self, name: str, there: set[int]) -> set[int]:
        """Return the known versions that went away since the last look: a directory may be being replaced."""
        known = {version.number for version in self._repository.versions() if version.name == name}
        newly = {number for number in known - there if (name, number) not in self._gone}
        self._gone = {key for key in self._gone if key[0] != name} | {(name, number) for number in known - there}
        for number in known - there:
            self._seen.pop((name, number), None)
        return newly

    def _differs(self, name: str, settled: list[OnDisk], leave: set[int]) -> bool:
        marks = {version.number: version.mark for version in self._repository.versions() if version.name == name}
        there = {version.number: version.mark for version in settled}
        dropped = marks.keys() - there.keys() - leave
        return bool(dropped) or any(marks.get(number) != mark for number, mark in there.items())
