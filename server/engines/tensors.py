"""Between numpy arrays and torch tensors, for the engines that run on torch."""

from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from layercast.models.datatypes import TORCH_DTYPES
from layercast.models.export.positional import named_outputs
from layercast.models.manifest import TensorSpec
from layercast.server.engines.base import Inputs
from layercast.server.work import Array

T = TypeVar("T", Array, Tensor)


def to_tensors(inputs: Inputs, specs: Sequence[TensorSpec], device: torch.device) -> dict[str, Tensor]:
    """Return the inputs by name, copied, in the model's order, on `device`.

    BF16 comes as float32 holding exact BF16 values.
    """
    return {spec.name: _to_tensor(inputs[spec.name], spec.datatype, device) for spec in specs}


def _to_tensor(array: Array, datatype: str, device: torch.device) -> Tensor:
    # The first layers of a module may write into what they are given. The array is the caller's: what runs next, on the
    # same rows, must find it as it was. Next to a forward the copy is little: 1 to 6 % of one with two layers.
    tensor = torch.from_numpy(array.copy())
    if datatype == "BF16":
        tensor = tensor.to(torch.bfloat16)
    return tensor if device.type == "cpu" else tensor.to(device)


def token_mask(specs: Sequence[TensorSpec], values: Mapping[str, T]) -> T | None:
    """Return which tokens count, [N, T], from the first padded input among `values`; None for a model without one.

    Reducers and edits leave the others out.
    """
    padded = {spec.name: spec.pad for spec in specs if spec.pad is not None}
    return next((tensor != padded[name] for name, tensor in values.items() if name in padded), None)


def by_name(result: object, specs: Sequence[TensorSpec]) -> dict[str, Tensor]:
    """Return what the model or a program returned (a tensor, tuple, list or dict) by output name."""
    return named_outputs(result, [spec.name for spec in specs])


def as_declared(tensors: dict[str, Tensor], specs: Sequence[TensorSpec]) -> dict[str, Tensor]:
    """Return outputs that were computed in BF16 in the floats that the manifest declares."""
    return {
        spec.name: tensors[spec.name].to(TORCH_DTYPES[spec.datatype])
        if tensors[spec.name].dtype == torch.bfloat16
        else tensors[spec.name]
        for spec in specs
    }
