"""Attention maps of torch's own MultiheadAttention, which computes them only where it is asked to."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

WEIGHTS: Final = "[weights]"
"""Part of the name under which a MultiheadAttention's maps are a layer: `layers.0.self_attn[weights]`."""


def attention_weights(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return the maps of a MultiheadAttention's call with these arguments, [N, H, T, S]; detached.

    None for any other module, and for a call without a batch, whose query is [T, D]. Computed beside the forward, so
    that what the layer returns stays as it is to the last bit. A query that may attend to nothing has a row of zeros.
    """
    if not isinstance(module, nn.MultiheadAttention):
        return None
    given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    if given["query"].dim() != 3:
        return None
    with torch.no_grad():
        _, weights = module.forward(**{**given, "need_weights": True, "average_attn_weights": False})
    # torch divides zero by zero for a query that may attend to nothing.
    return None if weights is None else weights.detach().nan_to_num(nan=0.0)
