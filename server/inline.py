"""Which batches of a model are over sooner than they could be handed to a thread and back."""

import time
from typing import Final

import numpy as np

from layercast.models.manifest import Manifest
from layercast.server.engines.base import Engine, Inputs

_LIMIT: Final = 0.00025
"""Seconds. A hand-over takes 0.1 ms of a processor and more; nothing else is answered while a forward runs inline."""
_RUNS: Final = 9
# Their time follows from the shapes. The code of a module or of TorchScript may do, and wait for, anything.
_STEADY: Final = ("onnx", "onnx-int8")


def inline_rows(engine: Engine, manifest: Manifest, one_row: Inputs, most: int) -> int:
    """Return how many rows, `most` at most, `engine` runs in so short a time that the event loop may wait for it.

    Measured with copies of `one_row`, sizes doubling. 0 for a model whose time depends on more than the rows: on the
    length of its inputs, or on what its code does.
    """
    if engine.name not in _STEADY or engine.device != "cpu":
        return 0
    if any(spec.dynamic_dimensions() for spec in manifest.inputs):
        return 0
    found, rows = 0, 1
    while rows <= most and _seconds(engine, one_row, rows) <= _LIMIT:
        found, rows = rows, rows * 2
    return found


def _seconds(engine: Engine, one_row: Inputs, rows: int) -> float:
    """Return the shortest duration of a warm run: what else the machine does meanwhile is not the model's."""
    inputs = {name: np.repeat(array, rows, axis=0) for name, array in one_row.items()}
    engine.run(inputs)
    durations = []
    for _ in range(_RUNS):
        start = time.perf_counter()
        engine.run(inputs)
        durations.append(time.perf_counter() - start)
    return min(durations)
