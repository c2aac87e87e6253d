"""Which batches of a model are over sooner than they could be handed to a thread and back."""

from pathlib import Path
from typing import Final

import numpy as np

from layercast.models.manifest import Manifest, Program
from layercast.models.onnx_shapes import steady
from layercast.server.engines.base import Engine, Inputs
from layercast.server.engines.timing import durations

_LIMIT: Final = 0.00075
"""Seconds. A hand-over takes 0.1 ms of a processor, and twice that where the loop is busy, since both threads want
Python's lock; nothing else is answered while a forward runs inline,"""
_LIMIT_A_REQUEST: Final = 0.00001
"""but that is so while requests are read and answered too, each of which takes several times as long."""
_RUNS: Final = 9
# The code of a module or of TorchScript may do, and wait for, anything; what these do can be seen.
_SEEN: Final[tuple[Program, ...]] = ("onnx", "onnx-int8")
_MOST_BYTES: Final = 32 << 20
"""Larger programs are not looked into: Python's lock is kept meanwhile, and what is that large takes longer."""


def inline_rows(engine: Engine, directory: Path, manifest: Manifest, one_row: Inputs, most: int) -> tuple[int, int]:
    """Return how many rows, `most` at most, `engine` runs in so short a time that the event loop may wait for it.

    First of any requests, then, which may be more, of requests of one row each. Measured with copies of `one_row`,
    sizes doubling. (0, 0) for a model whose time depends on more than the rows: on the length of its inputs, on their
    values, or on what its code does. OSError for a program that is gone.
    """
    name = next((name for name in _SEEN if name == engine.name), None)
    if name is None or engine.device != "cpu":
        return 0, 0
    if any(spec.dynamic_dimensions() or spec.datatype == "BYTES" for spec in manifest.inputs):
        return 0, 0
    whole, single, rows = 0, 0, 1
    while rows <= most and (seconds := _seconds(engine, one_row, rows)) <= _LIMIT + rows * _LIMIT_A_REQUEST:
        whole, single, rows = rows if seconds <= _LIMIT else whole, rows, rows * 2
    return (whole, single) if single and _steady(directory, manifest, manifest.programs[name]) else (0, 0)


def _steady(directory: Path, manifest: Manifest, program: str) -> bool:
    if manifest.files[program].bytes > _MOST_BYTES:
        return False
    return steady((directory / program).read_bytes())  # verified when the engine was loaded


def _seconds(engine: Engine, one_row: Inputs, rows: int) -> float:
    """Return the shortest duration of a warm run: what else the machine does meanwhile is not the model's."""
    inputs = {name: np.repeat(array, rows, axis=0) for name, array in one_row.items()}
    return min(durations(engine.run, inputs, _RUNS))
