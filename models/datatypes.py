"""Torch dtypes and the datatypes of the Open Inference Protocol."""

from typing import Final

import torch

TORCH_DTYPES: Final = {
    "BOOL": torch.bool,
    "UINT8": torch.uint8,
    "UINT16": torch.uint16,
    "UINT32": torch.uint32,
    "UINT64": torch.uint64,
    "INT8": torch.int8,
    "INT16": torch.int16,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "FP16": torch.float16,
    "FP32": torch.float32,
    "FP64": torch.float64,
    "BF16": torch.bfloat16,
}
"""Torch dtype by protocol datatype; BYTES has none."""

_NAMES: Final = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def datatype_of(dtype: torch.dtype) -> str | None:
    """Return the protocol's datatype for `dtype`, None where it has none (complex, quantised)."""
    return _NAMES.get(dtype)
