"""Between numpy arrays and torch tensors, for the engines that run on torch."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from layercast.models.manifest import TensorSpec
from layercast.server.engines.base import Inputs, Outputs
from layercast.server.work import Array


def to_tensors(inputs: Inputs, specs: Sequence[TensorSpec], device: torch.device) -> list[Tensor]:
    """Return the inputs in the model's order on `device`. A BF16 input comes as float32 holding exact BF16 values."""
    return [_to_tensor(inputs[spec.name], spec.datatype, device) for spec in specs]


def _to_tensor(array: Array, datatype: str, device: torch.device) -> Tensor:
    # A request's buffer is read-only memory that the model must never write to, in-place first layers included.
    tensor = torch.from_numpy(array if array.flags.writeable else array.copy())
    if datatype == "BF16":
        tensor = tensor.to(torch.bfloat16)
    return tensor if device.type == "cpu" else tensor.to(device)


def to_array(tensor: Tensor) -> Array:
    """Return a tensor's values as numpy on the host; bfloat16, which numpy lacks, as float32."""
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.float()
    array: Array = tensor.detach().cpu().numpy()
    return array


def to_outputs(result: object, specs: Sequence[TensorSpec]) -> Outputs:
    """Name what the model returned: a tensor, a tuple or list in the outputs' order, or a dict by output name."""
    if isinstance(result, Tensor):
        result = (result,)
    if isinstance(result, Mapping):
        result = tuple(result[spec.name] for spec in specs)
    if not isinstance(result, tuple | list) or len(result) != len(specs):
        raise TypeError(f"the model returned {type(result).__name__}, its manifest says {len(specs)} tensors")
    return {spec.name: to_array(tensor) for spec, tensor in zip(specs, result, strict=True)}
