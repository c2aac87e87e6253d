"""One forward for several requests: join their rows, run the right engine, give each its own rows back."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np

from layercast.models.manifest import Manifest, TensorSpec
from layercast.models.steering import Placed
from layercast.server import memory
from layercast.server.engines.base import Engine, Inputs, Outputs, Tapping
from layercast.server.engines.eager import EagerEngine
from layercast.server.errors import ModelFailed
from layercast.server.processors import denormals_are_zero
from layercast.server.work import Array, Rows, Tap, Work

_LARGE: Final = 1 << 22
"""Bytes of one input's batch from which on its memory is used again."""


class Runner:
    """One instance of a model: runs works that share a key, in one thread.

    `fast` serves plain predictions, `taps` a batch in which a row taps a layer, `eager` one in which a row changes one,
    and explanations.

    Without `taps`, no layer of the manifest may be available. `on_tapped` is told what read the layers of a batch.
    """

    def __init__(self, manifest: Manifest, fast: Engine, eager: EagerEngine | None, taps: Tapping | None) -> None:
        self._buffers = {spec.name: _Buffer(spec) for spec in manifest.inputs}
        self._name = manifest.name
        self.fast = fast
        self.eager = eager
        self.taps = taps
        self.on_tapped: Callable[[str], None] = lambda engine: None

    def __call__(self, works: Sequence[Work]) -> list[Rows]:
        """Return each work's rows, in order.

        Raises ModelFailed when the model gives another number of rows, OutOfMemory when there is not enough for them.
        """
        with denormals_are_zero():  # on the event loop as in an instance's own thread
            return memory.within(lambda: self._run(works), lambda: self._too_large(sum(work.rows for work in works)))

    def _run(self, works: Sequence[Work]) -> list[Rows]:
        inputs = self._join(works)
        rows, plain = 0, True
        for work in works:
            rows += work.rows
            plain = plain and not (work.taps or work.edits)
        outputs, features = (self.fast.run(inputs), {}) if plain else self._with_layers(works, inputs)
        for name, array in (*outputs.items(), *((tap.layer, array) for tap, array in features.items())):
            _check_rows(name, array, rows)
        if inputs is not works[0].inputs:
            outputs = {name: self._own(array) for name, array in outputs.items()}
            features = {tap: self._own(array) for tap, array in features.items()}
        return _split(works, outputs, features)

    def _with_layers(self, works: Sequence[Work], inputs: Inputs) -> tuple[Outputs, dict[Tap, Array]]:
        taps = list(dict.fromkeys(tap for work in works for tap in work.taps))
        predict = any(work.predict for work in works)
        edits = _placed(works)
        if edits:
            if self.eager is None:
                raise ModelFailed("a layer was to be changed in a model without its module. This is a bug.")
            found = self.eager.tapped(inputs, taps, predict, edits)
        elif self.taps is None:
            raise ModelFailed("a layer was asked of a model that can show none. This is a bug.")
        else:
            found = self.taps.tapped(inputs, taps, predict)
        if taps and self.taps:
            self.on_tapped("eager" if edits else self.taps.name)
        return found

    def _too_large(self, rows: int) -> str:
        device = "GPU" if self.fast.device == "cuda" else "machine"
        return (
            f"{rows} rows of model {self._name!r} together take more memory than the {device} has left; "
            f"send fewer rows in a request, smaller ones, or ask for fewer layers"
        )

    def _join(self, works: Sequence[Work]) -> Inputs:
        if len(works) == 1:
            return works[0].inputs
        return {name: buffer.join([work.inputs[name] for work in works]) for name, buffer in self._buffers.items()}

    def _own(self, array: Array) -> Array:
        """Return what the model gave, copied where it is (a part of) a buffer: no answer may see the next batch."""
        return array.copy() if any(buffer.holds(array) for buffer in self._buffers.values()) else array


def _placed(works: Sequence[Work]) -> list[Placed]:
    """Return the edits of all works, each with the rows of its own work."""
    placed, start = [], 0
    for work in works:
        placed += [(slice(start, start + work.rows), edit) for edit in work.edits]
        start += work.rows
    return placed


def _split(works: Sequence[Work], outputs: dict[str, Array], features: dict[Tap, Array]) -> list[Rows]:
    answers, start = [], 0
    for work in works:
        end = start + work.rows
        own = {name: array[start:end] for name, array in outputs.items()} if work.predict else {}
        answers.append(Rows(own, {tap: features[tap][start:end] for tap in work.taps} if work.taps else {}))
        start = end
    return answers


class _Buffer:
    """Joins the rows of one input; large batches lie in the same memory, one after the other.

    Memory that large goes back to the system when it is freed, and asking for it again costs more than the copy. For
    what is smaller the C library does as well: there fresh memory is as fast, and shared by nobody.
    """

    def __init__(self, spec: TensorSpec) -> None:
        self._pad = spec.pad
        self._memory: Array | None = None

    def join(self, arrays: Sequence[Array]) -> Array:
        """Return the rows of `arrays` one after the other; where lengths differ, padded to the longest."""
        if arrays[0].dtype.hasobject:
            return np.concatenate(arrays)
        rows, tail = sum(map(len, arrays)), arrays[0].shape[1:]
        if self._pad is None or all(array.shape[1:] == tail for array in arrays):
            return np.concatenate(arrays, out=self._place((rows, *tail), arrays[0].dtype))
        longest = max(array.shape[1] for array in arrays)
        joined = self._place((rows, longest, *tail[1:]), arrays[0].dtype)
        start = 0
        for array in arrays:
            own = joined[start : start + len(array)]
            own[:, : array.shape[1]] = array
            own[:, array.shape[1] :] = self._pad
            start += len(array)
        return joined

    def holds(self, array: Array) -> bool:
        """Tell whether `array` may lie in the memory of the next batch."""
        return self._memory is not None and np.may_share_memory(array, self._memory)

    def _place(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        size = math.prod(shape) * dtype.itemsize
        if size < _LARGE:
            return np.empty(shape, dtype)
        if self._memory is None or size > self._memory.nbytes:
            self._memory = np.empty(size, np.uint8)
        return self._memory[:size].view(dtype).reshape(shape)


def _check_rows(name: str, array: Array, rows: int) -> None:
    if array.ndim == 0 or len(array) != rows:
        raise ModelFailed(
            f"{name!r}: {rows} rows went into the model and an array of shape {list(array.shape)} came out; "
            f"its first dimension must be the batch"
        )
