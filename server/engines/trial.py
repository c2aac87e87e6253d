"""Two ways to read the same layers, over the same batches: which is faster, and whether they give the same values."""

from collections import deque
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from layercast.server.work import Array

_TRIALS: Final = 5
_LEAST_TRIALS: Final = 2
_CLEAR: Final = 1.25
"""As many times as long as the other, and a way is slower beyond doubt: the least trials are enough."""

_AGAIN: Final = 200
"""One batch in so many goes both ways again: the first ones may have met a busy machine."""

_TOLERANCE: Final = 1e-3


@dataclass
class Trial:
    """Both ways over the same rows, the last times, in nanoseconds; and batches since the start."""

    plain: deque[int] = field(default_factory=lambda: deque(maxlen=_TRIALS))
    part: deque[int] = field(default_factory=lambda: deque(maxlen=_TRIALS))
    batches: int = 0

    def due(self) -> bool:
        """Count a batch and tell whether it should go both ways."""
        self.batches += 1
        return len(self.part) < (_LEAST_TRIALS if self._clear else _TRIALS) or self.batches % _AGAIN == 0

    @property
    def won(self) -> bool:
        """Whether the part was faster."""
        return min(self.part) < min(self.plain)

    @property
    def _clear(self) -> bool:
        if not self.part:
            return False
        shorter, longer = sorted((min(self.part), min(self.plain)))
        return longer > _CLEAR * shorter


def same(got: Array, wanted: Array) -> bool:
    """Tell whether two arrays are equal, to a thousandth of the largest value that is wanted."""
    if got.shape != wanted.shape or got.dtype != wanted.dtype:
        return False
    values = np.abs(wanted.astype(np.float64))
    scale = float(np.max(values, where=np.isfinite(values), initial=1.0))
    return np.allclose(got, wanted, rtol=0, atol=_TOLERANCE * scale, equal_nan=True)
