"""Activations by name."""

import difflib

from torch import nn

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "leaky_relu": nn.LeakyReLU,
    "prelu": nn.PReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "selu": nn.SELU,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "softmax": nn.Softmax,
    "log_softmax": nn.LogSoftmax,
    "silu": nn.SiLU,
}


def activation(name: str) -> nn.Module:
    """Return a fresh activation module; softmax variants work over the last dimension.

    Raises ValueError listing the known names when `name` is none of them.
    """
    key = str(name).lower().replace("-", "_")
    if key not in ACTIVATIONS:
        near = difflib.get_close_matches(key, ACTIVATIONS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"unknown activation {name!r}{hint} Known: {', '.join(ACTIVATIONS)}")
    if key in ("softmax", "log_softmax"):
        return ACTIVATIONS[key](dim=-1)
    return ACTIVATIONS[key]()


def dropout_for(name: str, p: float) -> nn.Module:
    """Return the dropout that suits an activation: AlphaDropout for SELU (Klambauer et al. 2017)."""
    return nn.AlphaDropout(p) if name.lower() == "selu" else nn.Dropout(p)
