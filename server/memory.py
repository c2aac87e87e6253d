"""Giving memory back, and telling that there was not enough of it."""

import ctypes
from collections.abc import Callable
from typing import Final, TypeVar

import torch

from layercast.server.engines import cuda
from layercast.server.errors import OutOfMemory

T = TypeVar("T")

_SAID: Final = (
    "DefaultCPUAllocator: can't allocate memory",  # torch
    "CUDA out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "Failed to allocate memory for requested buffer",  # ONNX Runtime
    "CUDA error: out of memory",
    "CUDA failure 2: out of memory",
    "bad_alloc",
    "bad allocation",
)
"""What libraries say that have no exception for it, among them ONNX Runtime."""


def trim() -> None:
    """Return freed memory to the operating system, which the C library would keep for later; where it can (glibc)."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):
        return


def release() -> None:
    """Give all memory back that is kept for later, on the host and on the cards."""
    cuda.release()
    trim()


def ran_out(error: Exception) -> bool:
    """Tell whether `error` means that there was not enough memory, on the host or on a card."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(said in str(error) for said in _SAID)


def within(run: Callable[[], T], told: Callable[[], str]) -> T:
    """Return what `run` returns; OutOfMemory with the text of `told` when there was not enough memory for it."""
    try:
        return run()
    except Exception as error:
        if not ran_out(error):
            raise
    # Only here the error is gone, and with its traceback the tensors of the forward that failed.
    release()
    raise OutOfMemory(told())
