"""One forward for several requests: join their rows, run the right engine, give each its own rows back."""

from collections.abc import Sequence

import numpy as np

from layercast.models.manifest import Manifest
from layercast.models.steering import Placed
from layercast.server.engines.base import Engine, Inputs
from layercast.server.engines.eager import EagerEngine
from layercast.server.errors import ModelFailed
from layercast.server.work import Array, Rows, Tap, Work


class Runner:
    """One instance of a model: runs works that share a key, in one thread.

    `fast` serves plain predictions; `eager` any batch in which a row taps a layer or changes one.

    Without `eager`, no layer of the manifest may be available.
    """

    def __init__(self, manifest: Manifest, fast: Engine, eager: EagerEngine | None) -> None:
        self._manifest = manifest
        self.fast = fast
        self.eager = eager

    def __call__(self, works: Sequence[Work]) -> list[Rows]:
        """Return each work's rows, in order. Raises ModelFailed when the model gives another number of rows."""
        inputs = self._join(works)
        rows = sum(work.rows for work in works)
        taps = list(dict.fromkeys(tap for work in works for tap in work.taps))
        edits = _placed(works)
        if taps or edits:
            if self.eager is None:
                raise ModelFailed("a layer was asked of a model without its module. This is a bug.")
            predict = any(work.predict for work in works)
            outputs, features = self.eager.tapped(inputs, taps, predict, edits)
        else:
            outputs, features = self.fast.run(inputs), {}
        for name, array in (*outputs.items(), *((tap.layer, array) for tap, array in features.items())):
            _check_rows(name, array, rows)
        return _split(works, outputs, features)

    def _join(self, works: Sequence[Work]) -> Inputs:
        if len(works) == 1:
            return works[0].inputs
        return {
            spec.name: _concatenate([work.inputs[spec.name] for work in works], spec.pad)
            for spec in self._manifest.inputs
        }


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
        own = slice(start, start + work.rows)
        start += work.rows
        taken = {tap: features[tap][own] for tap in work.taps}
        answers.append(Rows({name: array[own] for name, array in outputs.items()} if work.predict else {}, taken))
    return answers


def _concatenate(arrays: list[Array], pad: int | None) -> Array:
    if pad is not None and len({array.shape[1] for array in arrays}) > 1:
        longest = max(array.shape[1] for array in arrays)
        arrays = [np.pad(a, ((0, 0), (0, longest - a.shape[1])), constant_values=pad) for a in arrays]
    return np.concatenate(arrays)


def _check_rows(name: str, array: Array, rows: int) -> None:
    if array.ndim == 0 or len(array) != rows:
        raise ModelFailed(
            f"{name!r}: {rows} rows went into the model and an array of shape {list(array.shape)} came out; "
            f"its first dimension must be the batch"
        )
