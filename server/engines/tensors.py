"""Between numpy arrays and torch tensors, for the engines that run on torch."""

from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from layercast.models.artefact import to_numpy
from layercast.models.export.positional import named_outputs
from layercast.models.manifest import TensorSpec
from layercast.server.engines.base import Inputs, Outputs
from layercast.server.work import Array

T = TypeVar("T", Array, Tensor)


def to_tensors(inputs: Inputs, specs: Sequence[TensorSpec], device: torch.device) -> dict[str, Tensor]:
    """Return the inputs by name, in the model's order, on `device`. BF16 comes as float32 holding exact BF16 values."""
    return {spec.name: _to_tensor(inputs[spec.name], spec.datatype, device) for spec in specs}


def _to_tensor(array: Array, datatype: str, device: torch.device) -> Tensor:
    # A request's buffer is read-only memory that the model must never write to, in-place first layers included.
    tensor = torch.from_numpy(array if array.flags.writeable else array.copy())
    if datatype == "BF16":
        tensor = tensor.to(torch.bfloat16)
    return tensor if device.type == "cpu" else tensor.to(device)


def token_mask(specs: Sequence[TensorSpec], values: Mapping[str, T]) -> T | None:
    """Return which tokens count, [N, T], from the first padded input among `values`; None for a model without one.

    Reducers and edits leave the others out.
    """
    padded = {spec.name: spec.pad for spec in specs if spec.pad is not None}
    return next((tensor != padded[name] for name, tensor in values.items() if name in padded), None)


def to_outputs(result: object, specs: Sequence[TensorSpec]) -> Outputs:
    """Return what the model or a program returned (a tensor, tuple, list or dict) as arrays by output name."""
    named = named_outputs(result, [spec.name for spec in specs])
    return {name: to_numpy(tensor) for name, tensor in named.items()}
