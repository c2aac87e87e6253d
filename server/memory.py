"""Giving memory back to the operating system."""

import ctypes


def trim() -> None:
    """Return freed memory to the operating system, which the C library would keep for later; where it can (glibc)."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):
        return
