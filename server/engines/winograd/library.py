"""The compiled kernel, winograd.cpp, and what it is called with."""

import ctypes
from functools import cache
from pathlib import Path

from layercast.server.engines.native.kernel import Kernel

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


class Member(ctypes.Structure):
    """As in winograd.cpp."""

    _fields_ = (("steps", ctypes.POINTER(Step)), ("scratch", ctypes.c_void_p))


class Library:
    """The kernel for this processor, which computes `lanes` channels in and `panel` channels out together."""

    def __init__(self, path: Path) -> None:
        self.kernel, pointer, number = Kernel(path), ctypes.c_void_p, ctypes.c_int
        self.lanes, self.panel = self.kernel.lanes, self.kernel.panel
        self.run = self.kernel.loaded.run
        """Computes with the calling thread and a crew, and without Python's lock."""
        self.run.argtypes = (ctypes.POINTER(Member), number, pointer, number, number, pointer, pointer)
        self.run.restype = None


@cache
def library(path: Path) -> Library:
    """Return the library at `path`, loaded once. OSError when it can't be."""
    return Library(path)
