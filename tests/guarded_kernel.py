"""A script: runs the kernel of the engine encoder on memory with a page on one side that nobody may read or write.

Usage: guarded_kernel.py LIBRARY before|behind. Without a library, it looks into such a page itself.
"""

import ctypes
import mmap
import sys
from pathlib import Path
from typing import Any

import numpy as np
from encoder_bodies import LOWEST, post_norm, pre_norm, values_for

from layercast.server.engines.encoder import plan
from layercast.server.engines.encoder.library import Library
from layercast.server.engines.native import memory
from layercast.server.engines.native.kernel import Crew

PAGE = mmap.PAGESIZE
PADDED = {"mask": "mask", "factor": "factor", "hidden": LOWEST}
kept: list[mmap.mmap] = []
behind = sys.argv[2] == "behind"


def guarded(size: int) -> np.ndarray:
    """Return `size` float32 numbers with such a page right before, or right behind, them."""
    length = -(-max(size, 1) * 4 // PAGE) * PAGE
    pages = mmap.mmap(-1, length + PAGE)
    kept.append(pages)
    begin = np.frombuffer(pages, "u1").ctypes.data
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    assert protect(ctypes.c_void_p(begin + (length if behind else 0)), ctypes.c_size_t(PAGE), 0) == 0
    first = length - size * 4 if behind else PAGE
    return np.frombuffer(pages, "f4", size, first)


def copied(array: np.ndarray) -> np.ndarray:
    """Return `array` there."""
    copy = guarded(array.size).view(array.dtype).reshape(array.shape)
    copy[:] = array
    return copy


class Numpy:
    """Stands for numpy, with results there."""

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    def empty(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        return guarded(int(np.prod(shape))).reshape(shape)


def main(path: str) -> None:
    if not path:
        array = guarded(3)
        ctypes.string_at(array.ctypes.data, array.nbytes + 1)
    memory.aligned = plan.aligned = guarded
    plan.np = Numpy()
    library = Library(Path(path))
    lanes = library.kernel.lanes
    bodies = (
        post_norm(lanes, 1, 1),
        post_norm(lanes, 3, 5, 7),
        pre_norm(lanes, 3, 1, **PADDED),
        pre_norm(lanes, 2, 3, **PADDED),
    )
    for body in bodies:
        made = plan.Plan(library, body, body.steps[0].weights.shape[0])
        for members in (1, 2):
            crew = Crew(library.kernel, members)
            for rows, length in ((1, 1), (2, 3), (7, 17), (3, 47), (2, 97), (40, 5), (1, 300)):
                values = {name: copied(array) for name, array in values_for(body, rows, length).items()}
                assert np.isfinite(made.run(values, crew, plan.Memory())).all()
    print("done")


main(sys.argv[1])
