"""Rows that calibrate an int8 program, and other rows on which its cost is measured."""

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import numpy as np

from layercast.models.datatypes import TORCH_DTYPES
from layercast.models.manifest import TensorSpec

TARGETS: Final = "targets"
"""Name of the array of true classes in a calibration file."""

FEWEST: Final = 8
_HELD_OUT_EVERY: Final = 4

Array = np.ndarray[Any, Any]


class CalibrationError(ValueError):
    """Calibration rows cannot be used; the text names the file or array, what was wanted and what came."""


@dataclass(frozen=True)
class Calibration:
    """Inputs by name to calibrate with, others to measure with, and the true classes int64 [N] of the latter."""

    data: str
    rows: Mapping[str, Array]
    held_out: Mapping[str, Array]
    targets: Array | None = None

    @classmethod
    def from_npz(cls, path: Path, specs: Sequence[TensorSpec]) -> Self:
        """Read an array for every input from `path`, with `targets` if they are known; every fourth row is held out.

        CalibrationError when the file is no npz, an input is missing or of another type or shape, the arrays differ
        in rows, or there are fewer than eight.
        """
        arrays = _load(path)
        names = {spec.name for spec in specs}
        targets = arrays.pop(TARGETS, None) if TARGETS not in names else None
        if arrays.keys() != names:
            raise CalibrationError(f"{path}: want the arrays {sorted(names)}, got {sorted(arrays)}")
        inputs = {spec.name: _fitted(arrays[spec.name], spec, path) for spec in specs}
        rows = {name: len(array) for name, array in inputs.items()} | ({} if targets is None else _rows(targets, path))
        count = next(iter(rows.values()))
        if len(set(rows.values())) > 1:
            raise CalibrationError(f"{path}: want as many rows in every array, got {rows}")
        if count < FEWEST:
            raise CalibrationError(f"{path}: want at least {FEWEST} rows, better some hundreds, got {count}")
        out = np.arange(count) % _HELD_OUT_EVERY == _HELD_OUT_EVERY - 1
        return cls(
            path.name,
            {name: array[~out] for name, array in inputs.items()},
            {name: array[out] for name, array in inputs.items()},
            None if targets is None else targets[out],
        )


def _load(path: Path) -> dict[str, Array]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except OSError as error:
        raise CalibrationError(f"{path}: {error.strerror or error}") from error
    except (ValueError, AttributeError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise CalibrationError(f"{path}: want a file of numpy.savez with an array for every input: {error}") from error


def _fitted(array: Array, spec: TensorSpec, path: Path) -> Array:
    """Return `array` in the input's dtype; whole numbers and floats convert within their kind."""
    if spec.datatype in ("BF16", "BYTES"):
        raise CalibrationError(
            f"{path}: {spec.name}: numpy has no {spec.datatype}, so no file can calibrate this model"
        )
    dtype = np.dtype(str(TORCH_DTYPES[spec.datatype]).removeprefix("torch."))
    fits = array.ndim == len(spec.shape) and all(
        want in (-1, size) for want, size in zip(spec.shape, array.shape, strict=True)
    )
    if not fits or not np.can_cast(array.dtype, dtype, "same_kind"):
        raise CalibrationError(
            f"{path}: {spec.name}: want {dtype} {list(spec.shape)} (-1: any size), "
            f"got {array.dtype} {list(array.shape)}"
        )
    if any(array.shape[place] > (spec.max_length or array.shape[place]) for place in spec.dynamic_dimensions()):
        raise CalibrationError(f"{path}: {spec.name}: want at most {spec.max_length} long, got {list(array.shape)}")
    if spec.range and array.size and array.dtype.kind in "iu":
        low, high = int(array.min()), int(array.max())
        if low < spec.range[0] or high > spec.range[1]:
            raise CalibrationError(f"{path}: {spec.name}: want {list(spec.range)}, got values from {low} to {high}")
    return np.ascontiguousarray(array, dtype)


def _rows(targets: Array, path: Path) -> dict[str, int]:
    if targets.ndim != 1 or not np.issubdtype(targets.dtype, np.integer):
        raise CalibrationError(f"{path}: {TARGETS}: want whole numbers [N], got {targets.dtype} {list(targets.shape)}")
    return {TARGETS: len(targets)}
