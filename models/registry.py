"""Architectures by name: the one table that training, export and the server look names up in."""

import difflib
import importlib
from typing import Any

from torch import nn

from layercast.models.manifest import TensorSpec

_MODULES = {
    "SimpleNet": "simple",
    "SharedWeights": "simple",
    "MLP": "mlp",
    "MNISTClassifier": "mlp",
    "ResNetLike": "resnet",
    "TransformerEncoder": "transformer",
}


def architectures() -> list[str]:
    """Return the known architecture names, sorted."""
    return sorted(_MODULES)


def architecture(name: str) -> type[nn.Module]:
    """Return the architecture class called `name`; ValueError with the nearest names when there is none."""
    if name not in _MODULES:
        near = difflib.get_close_matches(name, _MODULES, n=3, cutoff=0.4) or architectures()
        raise ValueError(f"unknown architecture {name!r}; nearest: {', '.join(near)}")
    module = importlib.import_module(f"layercast.models.architectures.{_MODULES[name]}")
    found: type[nn.Module] = getattr(module, name)
    return found


def build(name: str, **arguments: Any) -> nn.Module:
    """Construct the architecture `name` with its constructor `arguments`."""
    try:
        return architecture(name)(**arguments)
    except TypeError as error:
        raise ValueError(f"architecture {name}: {error}") from error


def input_specs(model: nn.Module) -> tuple[TensorSpec, ...]:
    """Return what the forward of a registered architecture takes, () for a module that does not say it."""
    said = getattr(model, "input_specs", None)
    return said() if callable(said) else ()
