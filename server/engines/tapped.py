"""Reads layers in the way that is measured fastest: hooks on the module, or parts of the ONNX program."""

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from layercast.server.engines.base import Inputs, Outputs, Tapping
from layercast.server.engines.taps import OnnxProgram, OnnxTaps
from layercast.server.errors import InvalidArgument
from layercast.server.work import Array, Tap

logger = logging.getLogger(__name__)

MOST_PARTS: Final = 8
"""So many sets of layers are remembered, the last ones used."""

_WORTH: Final = 2
"""A set of layers is compiled when it is asked for this often: one that comes once is not worth it."""

_LEAST_BYTES: Final = 64 << 20
_TRIALS: Final = 5
_AGAIN: Final = 200
"""One batch in so many goes both ways again: the first ones may have met a busy machine."""

_TOLERANCE: Final = 1e-3

LayerSet = tuple[frozenset[str], bool]
"""Layers, and whether the outputs are wanted too."""


@dataclass
class _Trial:
    """Both ways over the same rows, the last times, in nanoseconds; and batches since the start."""

    plain: deque[int] = field(default_factory=lambda: deque(maxlen=_TRIALS))
    part: deque[int] = field(default_factory=lambda: deque(maxlen=_TRIALS))
    batches: int = 0

    def due(self) -> bool:
        """Count a batch and tell whether it should go both ways."""
        self.batches += 1
        return len(self.part) < _TRIALS or self.batches % _AGAIN == 0

    @property
    def won(self) -> bool:
        return min(self.part) < min(self.plain)


@dataclass
class _Entry:
    """A set of layers: how often it came, its part once that is compiled, and the trials by size of the batch."""

    asked: int = 0
    part: OnnxTaps | None = None
    given_up: bool = False
    trials: dict[int, _Trial] = field(default_factory=dict)


class TappedEngine:
    """Reads layers with `plain` until a part of `program` that gives the same ones is compiled and found faster.

    Compiling happens in a thread beside. The first batches of every size, and a few later ones, go both ways, for time
    and for values: a part that gives others is not used. Parts are kept for the sets of layers that came last, in no
    more memory than the program takes itself (or 64 MB).
    """

    def __init__(self, plain: Tapping, program: OnnxProgram) -> None:
        self.name = plain.name
        self._plain = plain
        self._program = program
        self._entries: OrderedDict[LayerSet, _Entry] = OrderedDict()
        self._budget = max(_LEAST_BYTES, program.bytes)
        self._compiling: threading.Thread | None = None
        self._told = False

    @property
    def parts(self) -> int:
        """How many parts are compiled."""
        return sum(entry.part is not None for entry in self._entries.values())

    def settle(self) -> None:
        """Wait for the part that is being compiled."""
        if self._compiling:
            self._compiling.join()

    def tapped(self, inputs: Inputs, taps: Sequence[Tap], predict: bool) -> tuple[Outputs, dict[Tap, Array]]:
        """Return the outputs (none unless `predict`) and the values of `taps`, as `Tapping.tapped`."""
        entry = self._entry(taps, predict)
        if entry is None or entry.part is None or entry.given_up:
            return self._by(self._plain, inputs, taps, predict)
        trial = entry.trials.setdefault((len(next(iter(inputs.values()))) - 1).bit_length(), _Trial())
        if trial.due():
            return self._try(entry, entry.part, trial, inputs, taps, predict)
        if not trial.won:
            return self._by(self._plain, inputs, taps, predict)
        try:
            return self._by(entry.part, inputs, taps, predict)
        except InvalidArgument:
            raise
        except Exception as error:  # ONNX Runtime's share no class
            self._give_up(entry, error)
            return self._by(self._plain, inputs, taps, predict)

    def _by(
        self, tapping: Tapping, inputs: Inputs, taps: Sequence[Tap], predict: bool
    ) -> tuple[Outputs, dict[Tap, Array]]:
        self.name = tapping.name
        return tapping.tapped(inputs, taps, predict)

    def _try(
        self, entry: _Entry, part: OnnxTaps, trial: _Trial, inputs: Inputs, taps: Sequence[Tap], predict: bool
    ) -> tuple[Outputs, dict[Tap, Array]]:
        """Go both ways, and answer what `plain` gives."""
        start = time.perf_counter_ns()
        wanted = self._by(self._plain, inputs, taps, predict)
        between = time.perf_counter_ns()
        try:
            got = part.tapped(inputs, taps, predict)
        except Exception as error:
            self._give_up(entry, error)
            return wanted
        trial.plain.append(between - start)
        trial.part.append(time.perf_counter_ns() - between)
        apart = [tap.layer for tap in taps if not _same(got[1][tap], wanted[1][tap])]
        apart += [name for name in wanted[0] if not _same(got[0][name], wanted[0][name])]
        if apart:
            self._give_up(entry, f"it gives other values of {apart[0]}")
        return wanted

    def _entry(self, taps: Sequence[Tap], predict: bool) -> _Entry | None:
        """Return the entry of these layers, counted; None where one has no value in the program."""
        layers = frozenset(tap.layer for tap in taps)
        if not all(layer in self._program.layers for layer in layers):
            return None
        key = (layers, predict)
        entry = self._entries.setdefault(key, _Entry())
        self._entries.move_to_end(key)
        entry.asked += 1
        self._bound()
        busy = self._compiling is not None and self._compiling.is_alive()
        if entry.asked >= _WORTH and entry.part is None and not entry.given_up and not busy:
            self._compiling = threading.Thread(target=self._compile, args=(key, entry), daemon=True)
            self._compiling.start()
        return entry

    def _bound(self) -> None:
        """Let go of the sets that were not asked for the longest while there are too many, or their parts too large."""
        sizes = [entry.part.bytes if entry.part else 0 for entry in self._entries.values()]
        while len(self._entries) > MOST_PARTS or (len(self._entries) > 1 and sum(sizes) > self._budget):
            self._entries.popitem(last=False)
            sizes.pop(0)

    def _compile(self, key: LayerSet, entry: _Entry) -> None:
        try:
            part = self._program.part(*key)
        except Exception as error:  # a file that changed, a graph that can't be cut, a runtime that refuses it
            self._give_up(entry, error)
            return
        if part.bytes > self._budget:
            self._give_up(entry, f"it takes {part.bytes:,} bytes, {self._budget:,} are to be had")
        else:
            entry.part = part

    def _give_up(self, entry: _Entry, reason: object) -> None:
        entry.given_up, entry.part = True, None
        if not self._told:
            self._told = True
            lines = str(reason).splitlines()
            text = lines[0] if lines else type(reason).__name__
            logger.warning("%s: layers are read by %s: %s", self._program.manifest.name, self._plain.name, text)


def _same(got: Array, wanted: Array) -> bool:
    if got.shape != wanted.shape or got.dtype != wanted.dtype:
        return False
    values = np.abs(wanted.astype(np.float64))
    scale = float(np.max(values, where=np.isfinite(values), initial=1.0))
    return np.allclose(got, wanted, rtol=0, atol=_TOLERANCE * scale, equal_nan=True)
