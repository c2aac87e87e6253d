"""What every compiled kernel has: the sizes that it computes with, and threads that share a run."""

import ctypes
import weakref
from pathlib import Path


class Kernel:
    """The library at `path`. `lanes` numbers are computed at once, `panel` columns of a product together.

    OSError when it can't be loaded.
    """

    def __init__(self, path: Path) -> None:
        self.loaded = ctypes.CDLL(str(path))
        self.lanes = ctypes.c_int.in_dll(self.loaded, "lanes").value
        self.panel = ctypes.c_int.in_dll(self.loaded, "panel").value
        self.loaded.crew.argtypes = (ctypes.c_int,)
        self.loaded.crew.restype = ctypes.c_void_p
        self.loaded.dismiss.argtypes = (ctypes.c_void_p,)
        self.loaded.dismiss.restype = None

    def crew(self, members: int) -> "Crew":
        """Return a crew of so many threads, the calling one among them."""
        return Crew(self, members)


class Crew:
    """Threads that share the parts of a run, `members` with the one that calls, for as long as this lives."""

    def __init__(self, kernel: Kernel, members: int) -> None:
        self.members = members
        self.pointer: int | None = kernel.loaded.crew(members - 1)
        if self.pointer is None:
            raise MemoryError("no memory for threads")
        # Not at the end of the process: a thread of the server may still compute.
        weakref.finalize(self, kernel.loaded.dismiss, self.pointer).atexit = False

    def group(self, most: int, rows: int) -> int:
        """Return how many of so many rows go through all steps together, at `most`.

        No more than leave each thread two parts: one may begin late.
        """
        return most if self.members == 1 else max(1, min(most, -(-rows // (2 * self.members))))
