"""Fit an array to the datatype that a model declares, or say why not.

Allowed: what numpy calls safe (uint8 to float32), whole numbers that fit exactly (int64 to INT32 or FP32 when every
value survives), and float narrowing (float64 to FP32) that loses digits but nothing else. Never float to integer.
"""

import numpy as np
from numpy.typing import ArrayLike

from layercast.client.errors import InvalidArgument
from layercast.proto.codec import AnyArray, CodecError
from layercast.proto.tensors import BFLOAT16, bytes_elements, memory_dtype

# Whole numbers up to here are exact: 2 to the power of the significand's bits.
_EXACT_BITS = {"FP16": 11, "BF16": 8, "FP32": 24, "FP64": 53}


def fit(name: str, value: ArrayLike, datatype: str) -> AnyArray:
    """The value as an array that the codec encodes as `datatype`. Raises InvalidArgument when that would change it."""
    array = _as_array(name, value, datatype)
    try:
        wanted = memory_dtype(datatype)
        if datatype == "BYTES":
            elements = np.empty(array.size, object)
            elements[:] = bytes_elements(array)
            return elements.reshape(array.shape)
    except CodecError as error:
        raise InvalidArgument(f"input {name!r}: {error}") from error
    if array.dtype.kind not in "biuf":
        raise _refusal(name, array, datatype, f"pass numbers of type {wanted.name}")
    if not np.can_cast(array.dtype, wanted, "safe") or datatype == BFLOAT16:
        _check(name, array, datatype, wanted)
    with np.errstate(over="ignore"):
        return array.astype(wanted, copy=False)


def _as_array(name: str, value: ArrayLike, datatype: str) -> AnyArray:
    try:
        if datatype == "BYTES" and not isinstance(value, np.ndarray):
            # numpy's own string types would drop NULs at the end of an element.
            return np.asarray(value, object)
        return np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as error:
        # Ragged lists, torch tensors on a GPU or with a gradient.
        raise InvalidArgument(f"input {name!r} does not convert to a numpy array: {error}") from error


def _check(name: str, array: AnyArray, datatype: str, wanted: np.dtype[np.generic]) -> None:
    kinds = array.dtype.kind + wanted.kind
    if array.size == 0 and kinds in ("ii", "iu", "ui", "uu", "if", "uf", "ff"):
        return
    if kinds == "ff":
        with np.errstate(over="ignore"):
            overflows = np.isinf(array.astype(wanted)) & np.isfinite(array)
        if overflows.any():
            raise _refusal(name, array, datatype, f"{array[overflows][0]} is out of its range")
    elif kinds in ("if", "uf", "bf"):
        limit = 2 ** _EXACT_BITS[datatype]
        if max(abs(int(array.min())), abs(int(array.max()))) > limit:
            raise _refusal(name, array, datatype, f"whole numbers beyond {limit} lose digits; convert it yourself")
    elif kinds in ("ii", "iu", "ui", "uu"):
        bounds = np.iinfo(wanted.name)
        low, high = int(array.min()), int(array.max())
        if low < bounds.min or high > bounds.max:
            worst = low if low < bounds.min else high
            raise _refusal(name, array, datatype, f"{worst} is out of its range")
    else:
        raise _refusal(name, array, datatype, f"convert it with .astype({wanted.name!r})")


def _refusal(name: str, array: AnyArray, datatype: str, cure: str) -> InvalidArgument:
    return InvalidArgument(f"input {name!r} is {datatype}, got an array of {array.dtype}: {cure}")
