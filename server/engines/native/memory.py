"""Memory for kernels."""

from typing import Final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

LINE: Final = 16
"""Numbers in a line of the cache."""


def aligned(size: int) -> Floats:
    """Return `size` zeros that begin with a line of the cache."""
    raw = np.zeros(size + LINE, np.float32)
    first = -(raw.ctypes.data // raw.itemsize) % LINE
    return raw[first : first + size]


def kept(values: NDArray[np.floating]) -> Floats:
    """Return a copy of `values`, one after the other, that begins so."""
    copy = aligned(values.size)
    copy.reshape(values.shape)[:] = values
    return copy


def address(array: Floats) -> int:
    """Return where `array` begins."""
    return int(array.ctypes.data)
