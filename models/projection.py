"""Random projections that are the same on every machine."""

import functools
import math
import re
from dataclasses import dataclass
from typing import Final, Self

import numpy as np
import torch
from torch import Tensor

MAX_ENTRIES: Final = 4 << 20
"""Values in one matrix, 16 MiB of float32; with the number of matrices kept, the bound on their memory."""

MAX_SIZE: Final = 4096
"""Dimensions that a projection may give."""

_TEXT: Final = re.compile(r"^proj(?P<size>[1-9]\d{0,3})(?::(?P<seed>\d{1,9}))?$")
_MATRICES_KEPT: Final = 4
_RAW_BLOCK: Final = 1 << 20


@dataclass(frozen=True)
class Projection:
    """[N, W] -> [N, size]: distances between rows stay about the same (Johnson and Lindenstrauss 1984).

    The matrix is that of Achlioptas (2003): +1, 0, -1 with probabilities 1/6, 2/3, 1/6, times sqrt(3 / size). It comes
    from the integers of numpy's PCG64 bit generator, whose stream is fixed for good, so that the same seed gives the
    same matrix on every machine and device. Rows are drawn in turn: a narrower input is projected as a wider one
    that ends in zeros.
    """

    size: int
    seed: int = 0

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """Read `proj64` or `proj64:7` (seed 7, the default is 0); None for anything else."""
        found = _TEXT.match(text)
        if found is None or int(found["size"]) > MAX_SIZE:
            return None
        return cls(int(found["size"]), int(found["seed"] or 0))

    @property
    def text(self) -> str:
        """The projection as `parse` reads it."""
        return f"proj{self.size}:{self.seed}" if self.seed else f"proj{self.size}"

    @property
    def widest(self) -> int:
        """The largest W, so that the matrix stays within MAX_ENTRIES."""
        return MAX_ENTRIES // self.size

    def __call__(self, value: Tensor) -> Tensor:
        """Return the projection of `value` [N, W] as [N, size], computed in float32 (float64 for float64)."""
        dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
        return value.to(dtype) @ _matrix(value.shape[1], self.size, self.seed, value.device).to(dtype)


@functools.lru_cache(maxsize=_MATRICES_KEPT)
def _matrix(width: int, size: int, seed: int, device: torch.device) -> Tensor:
    """Return the matrix [width, size] on `device`, float32."""
    if width * size > MAX_ENTRIES:
        raise ValueError(f"a projection of {width:,} values to {size:,} has more than {MAX_ENTRIES:,} entries")
    bits = np.random.PCG64(seed)
    signs = np.empty(width * size, np.float32)
    for start in range(0, len(signs), _RAW_BLOCK):
        draw = bits.random_raw(min(_RAW_BLOCK, len(signs) - start)) % 6
        signs[start : start + len(draw)] = (draw == 0).astype(np.float32) - (draw == 1)
    signs *= math.sqrt(3 / size)
    # A cached tensor outlives the inference mode it may be made in, and must not carry that mode's mark.
    with torch.inference_mode(False):
        return torch.from_numpy(signs.reshape(width, size)).to(device)
