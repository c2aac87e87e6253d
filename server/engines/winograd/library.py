"""The compiled kernel, winograd.cpp, and what it is called with."""

import ctypes
from functools import cache
from pathlib import Path

from layercast.server import compiled

NAME = "winograd"


class Map(ctypes.Structure):
    """As in winograd.cpp."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int) for name in ("height", "width", "lines", "pitch", "channels")),
    )


class Step(ctypes.Structure):
    """As in winograd.cpp."""

    _fields_ = (
        *((name, Map) for name in ("source", "target", "shortcut")),
        ("weights", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        *((name, ctypes.c_int) for name in ("kernel", "stride", "rectify", "block")),
    )


class Library:
    """The kernel for this processor. `lanes` and `panel` are the channels that it computes together, in and out."""

    def __init__(self, path: Path) -> None:
        loaded, pointer, number = ctypes.CDLL(str(path)), ctypes.c_void_p, ctypes.c_int
        self.lanes = number.in_dll(loaded, "lanes").value
        self.panel = number.in_dll(loaded, "panel").value
        self.run = loaded.run
        """Computes with the calling thread, and without Python's lock."""
        self.run.argtypes = (pointer, number, pointer, number, number, pointer, pointer)
        self.run.restype = None


def why_not() -> str:
    """Return why the engine can't run here, "" where it can."""
    if compiled.kernel(NAME) is None:
        return "its kernel is not compiled (`layercast compile`, on x86-64 with AVX2 or AVX-512)"
    return ""


@cache
def library(path: Path) -> Library:
    """Return the library at `path`, loaded once. OSError when it can't be."""
    return Library(path)
