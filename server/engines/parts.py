"""The parts of an ONNX program that are compiled: for the sets of layers asked for most, in bounded time and memory."""

import logging
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Final

from layercast.server import processors
from layercast.server.engines.taps import OnnxProgram, OnnxTaps
from layercast.server.engines.trial import Trial

logger = logging.getLogger(__name__)

MOST_PARTS: Final = 8
"""So many are kept."""

MOST_SETS: Final = 64
"""So many sets of layers are counted: those with a part, and the last ones that were asked for."""

_WORTH: Final = 2
"""A set of layers is compiled when it is asked for this often: one that comes once is not worth it."""

_OFTENER: Final = 2
"""A part goes for one that is asked for more than so many times as often. Sets that take turns differ by less."""

_HALVED: Final = 1024
"""After as many batches every count is halved, so that what is asked for now outweighs what once was."""

_PAUSE: Final = 10
"""Nothing is compiled for so many times as long as the last compile took, some of it with Python's lock held."""

LayerSet = tuple[frozenset[str], bool]
"""Layers, and whether the outputs are wanted too."""


@dataclass(eq=False)
class Entry:
    """A set of layers: how often it came lately, its part while there is one, and the trials by size of the batch.

    `bytes` is the size of the part, known once it was compiled.
    """

    asked: int = 0
    part: OnnxTaps | None = None
    bytes: int = 0
    given_up: bool = False
    trials: dict[int, Trial] = field(default_factory=dict)


class Parts:
    """Counts which sets of layers are asked for, and compiles parts of `program` for them, in a thread beside.

    Parts take up to `budget` bytes together. Called by one thread. `otherwise` names what reads layers without a part.
    """

    def __init__(self, program: OnnxProgram, budget: int, otherwise: str) -> None:
        self._program = program
        self._budget = budget
        self._otherwise = otherwise
        self._entries: OrderedDict[LayerSet, Entry] = OrderedDict()
        self._kept: list[Entry] = []
        self._batches = self._not_before = 0
        self._compiling: threading.Thread | None = None
        self._compiled: tuple[LayerSet, Entry, OnnxTaps | Exception] | None = None
        self._told = False

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._kept)

    def asked(self, key: LayerSet) -> Entry:
        """Count that a batch asks for `key` and return its entry; a part is compiled when it is time for that."""
        self._keep()
        entry = self._count(key)
        busy = self._compiling is not None and self._compiling.is_alive()
        if entry.part or entry.given_up or entry.asked < _WORTH or busy or time.perf_counter_ns() < self._not_before:
            return entry
        if self._making_room(entry) is not None:
            self._compiling = threading.Thread(target=self._compile, args=(key, entry), daemon=True)
            self._compiling.start()
        return entry

    def settle(self) -> None:
        """Wait for the part that is being compiled."""
        if self._compiling:
            self._compiling.join()
        self._keep()

    def give_up(self, entry: Entry, reason: object) -> None:
        """Let go of a part for good, and say why of the first one."""
        entry.given_up, entry.part = True, None
        self._kept = [kept for kept in self._kept if kept is not entry]
        if not self._told:
            self._told = True
            lines = str(reason).splitlines()
            text = lines[0] if lines else type(reason).__name__
            logger.warning("%s: layers are read by %s: %s", self._program.manifest.name, self._otherwise, text)

    def _count(self, key: LayerSet) -> Entry:
        entry = self._entries.setdefault(key, Entry())
        self._entries.move_to_end(key)
        entry.asked += 1
        if len(self._entries) > MOST_SETS:
            del self._entries[next(key for key, entry in self._entries.items() if entry.part is None)]
        self._batches += 1
        if self._batches % _HALVED == 0:
            for every in self._entries.values():
                every.asked //= 2
        return entry

    def _making_room(self, entry: Entry) -> list[Entry] | None:
        """Return the entries whose parts go for that of `entry`, maybe none; None if too few are asked for so little.

        As long as its size is not known, it counts as nothing.
        """
        size = entry.bytes + sum(kept.bytes for kept in self._kept)
        going: list[Entry] = []
        for least in sorted(self._kept, key=lambda kept: kept.asked):
            if len(self._kept) - len(going) < MOST_PARTS and size <= self._budget:
                break
            if entry.asked <= _OFTENER * least.asked:
                return None
            going.append(least)
            size -= least.bytes
        return going

    def _compile(self, key: LayerSet, entry: Entry) -> None:
        processors.on_all()  # the thread that asks may keep to its own
        start = time.perf_counter_ns()
        try:
            made: OnnxTaps | Exception = self._program.part(*key)
        except Exception as error:  # a file that changed, a graph that can't be cut, a runtime that refuses it
            made = error
        end = time.perf_counter_ns()
        self._not_before = end + _PAUSE * (end - start)
        self._compiled = key, entry, made

    def _keep(self) -> None:
        """Take up the part that was compiled last, if there is room for it."""
        if self._compiled is None:
            return
        (key, entry, part), self._compiled = self._compiled, None
        if isinstance(part, Exception):
            self.give_up(entry, part)
            return
        entry.bytes = part.bytes
        if part.bytes > self._budget:
            self.give_up(entry, f"it takes {part.bytes:,} bytes, {self._budget:,} are to be had")
            return
        going = self._making_room(entry)
        if going is None or self._entries.get(key) is not entry:
            return
        for other in going:
            other.part = None
        self._kept = [kept for kept in self._kept if kept.part]
        self._kept.append(entry)
        entry.part = part
