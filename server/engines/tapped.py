"""Reads layers in the way that is measured fastest: hooks on the module, or parts of the ONNX program."""

import time
from collections.abc import Callable, Sequence
from typing import Final

from layercast.server.engines.base import Inputs, Outputs, Tapping
from layercast.server.engines.parts import Entry, Parts
from layercast.server.engines.taps import OnnxProgram, OnnxTaps
from layercast.server.engines.trial import Trial, same
from layercast.server.errors import InvalidArgument
from layercast.server.work import Array, Tap

_LEAST_BYTES: Final = 64 << 20


class TappedEngine:
    """Reads layers with `plain` until a part of `program` that gives the same ones is compiled and found faster.

    Compiling happens in a thread beside. The first batches of every size, and a few later ones, go both ways, for time
    and for values: a part that gives others is not used. Parts are kept for the sets of layers that are asked for most.
    Those of all `instances` of the model together take no more memory than the program itself (or 64 MB).
    """

    def __init__(self, plain: Tapping, program: OnnxProgram, instances: int = 1) -> None:
        self.name = plain.name
        self.on_stopped: Callable[[float], None] = lambda skipped: None
        """Told, in the thread that runs, of an answer by a part that ended early: the share of layers left out."""
        self._plain = plain
        self._program = program
        self._parts = Parts(program, max(_LEAST_BYTES, program.bytes) // instances, plain.name)

    @property
    def parts(self) -> int:
        """How many parts are compiled."""
        return len(self._parts)

    def settle(self) -> None:
        """Wait for the part that is being compiled."""
        self._parts.settle()

    def tapped(self, inputs: Inputs, taps: Sequence[Tap], predict: bool) -> tuple[Outputs, dict[Tap, Array]]:
        """Return the outputs (none unless `predict`) and the values of `taps`, as `Tapping.tapped`."""
        entry = self._entry(taps, predict)
        if entry is None or entry.part is None:
            return self._by(self._plain, inputs, taps, predict)
        part = entry.part
        trial = entry.trials.setdefault((len(next(iter(inputs.values()))) - 1).bit_length(), Trial())
        if trial.due():
            return self._try(entry, part, trial, inputs, taps, predict)
        if not trial.won:
            return self._by(self._plain, inputs, taps, predict)
        try:
            answer = self._by(part, inputs, taps, predict)
        except InvalidArgument:
            raise
        except Exception as error:  # ONNX Runtime's share no class
            self._parts.give_up(entry, error)
            return self._by(self._plain, inputs, taps, predict)
        if part.skipped:
            self.on_stopped(part.skipped)
        return answer

    def _by(
        self, tapping: Tapping, inputs: Inputs, taps: Sequence[Tap], predict: bool
    ) -> tuple[Outputs, dict[Tap, Array]]:
        self.name = tapping.name
        return tapping.tapped(inputs, taps, predict)

    def _try(
        self, entry: Entry, part: OnnxTaps, trial: Trial, inputs: Inputs, taps: Sequence[Tap], predict: bool
    ) -> tuple[Outputs, dict[Tap, Array]]:
        """Go both ways, and answer what `plain` gives."""
        start = time.perf_counter_ns()
        wanted = self._by(self._plain, inputs, taps, predict)
        between = time.perf_counter_ns()
        try:
            got = part.tapped(inputs, taps, predict)
        except Exception as error:
            self._parts.give_up(entry, error)
            return wanted
        trial.plain.append(between - start)
        trial.part.append(time.perf_counter_ns() - between)
        apart = [tap.layer for tap in taps if not same(got[1][tap], wanted[1][tap])]
        apart += [name for name in wanted[0] if not same(got[0][name], wanted[0][name])]
        if apart:
            self._parts.give_up(entry, f"it gives other values of {apart[0]}")
        return wanted

    def _entry(self, taps: Sequence[Tap], predict: bool) -> Entry | None:
        """Return the entry of these layers, counted; None where one has no value in the program."""
        layers = frozenset(tap.layer for tap in taps)
        if not all(layer in self._program.layers for layer in layers):
            return None
        return self._parts.asked((layers, predict))
