"""The compiled kernel, encoder.cpp, and what it is called with."""

import ctypes
from enum import IntEnum
from functools import cache
from pathlib import Path
from typing import Final

from layercast.server.engines.native.kernel import Kernel

NAME: Final = "encoder"

ACTIVATIONS: Final = {"": 0, "relu": 1, "gelu": 2}
QUERIES: Final = 48
"""As in encoder.cpp."""


class Kind(IntEnum):
    """What a step computes."""

    LINEAR = 0
    NORM = 1
    ATTENTION = 2


class Step(ctypes.Structure):
    """As in encoder.cpp."""

    _fields_ = (
        *(
            (name, ctypes.c_int)
            for name in (
                "kind", "activation", "source", "target", "addend", "into", "out", "heads", "mask", "factor",
            )
        ),
        ("number", ctypes.c_float),
        ("hidden", ctypes.c_float),
        ("weights", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
    )  # fmt: skip


class Steps(ctypes.Structure):
    """`Plan` in encoder.cpp."""

    _fields_ = (
        ("steps", ctypes.POINTER(Step)),
        ("count", ctypes.c_int),
        ("places", ctypes.POINTER(ctypes.c_ssize_t)),
        ("width", ctypes.c_ssize_t),
    )


class Batch(ctypes.Structure):
    """As in encoder.cpp."""

    _fields_ = (
        ("input", ctypes.c_void_p),
        ("output", ctypes.c_void_p),
        ("into", ctypes.c_int),
        ("out", ctypes.c_int),
        ("sides", ctypes.POINTER(ctypes.c_void_p)),
        *((name, ctypes.c_int) for name in ("rows", "length", "group")),
        ("memory", ctypes.c_void_p),
        ("each", ctypes.c_ssize_t),
    )


class Library:
    """The kernel for this processor."""

    def __init__(self, path: Path) -> None:
        self.kernel = Kernel(path)
        self.run = self.kernel.loaded.run
        """Computes with the calling thread and a crew, and without Python's lock."""
        self.run.argtypes = (ctypes.POINTER(Steps), ctypes.POINTER(Batch), ctypes.c_void_p)
        self.run.restype = None


@cache
def library(path: Path) -> Library:
    """Return the library at `path`, loaded once. OSError when it can't be."""
    return Library(path)
