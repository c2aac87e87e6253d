"""Loads an artefact's module and golden values. Nothing here unpickles: weights are safetensors, code is named."""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from layercast.models import registry
from layercast.models.card import Card
from layercast.models.manifest import WEIGHTS_FILE, Manifest


class ArtefactError(ValueError):
    """A module cannot be built from what the artefact holds; the text says what was wanted and what came."""


@dataclass(frozen=True)
class Golden:
    """Inputs and the outputs that the exporting machine computed for them, by name."""

    inputs: dict[str, np.ndarray[Any, Any]]
    outputs: dict[str, np.ndarray[Any, Any]]


def load_module(directory: Path | str, manifest: Manifest) -> nn.Module:
    """Build the architecture of `manifest` and load the verified weights into it; on the CPU, in eval mode.

    Loading is strict and keeps tied weights tied. ArtefactError names the keys that do not fit.
    """
    content = manifest.read_verified(directory, WEIGHTS_FILE)
    module = build(manifest.architecture, manifest.arguments)
    load_weights(module, content, Path(directory) / WEIGHTS_FILE)
    return module.eval()


def module_from_card(directory: Path | str) -> nn.Module:
    """Build the model of a zoo folder (card and weights); on the CPU, in eval mode."""
    card = Card.read(directory)
    path = Path(directory) / WEIGHTS_FILE
    module = build(card.architecture, card.arguments)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ArtefactError(f"{path}: {error.strerror or error}") from error
    load_weights(module, content, path)
    return module.eval()


def build(architecture: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Construct a registered architecture, or `package.module:Class` of an installed package."""
    if ":" not in architecture:
        try:
            return registry.build(architecture, **arguments)
        except ValueError as error:
            raise ArtefactError(str(error)) from error
    name, _, attribute = architecture.partition(":")
    try:
        made = getattr(importlib.import_module(name), attribute)(**arguments)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ArtefactError(f"architecture {architecture}: {error}") from error
    if not isinstance(made, nn.Module):
        raise ArtefactError(f"architecture {architecture}: want an nn.Module, got {type(made).__name__}")
    return made


def load_weights(module: nn.Module, content: bytes, source: Path | str) -> None:
    """Load the safetensors `content` into `module`, strictly; `source` is named in errors.

    A tied weight is stored once, under any of its names.
    """
    try:
        stored = safetensors.torch.load(content)
    except SafetensorError as error:
        raise ArtefactError(f"{source}: not a safetensors file: {error}") from error
    wanted = module.state_dict()
    unexpected = sorted(stored.keys() - wanted.keys())
    missing = []
    for names in shared_names(module):
        known = [name for name in names if name in stored]
        if not known:
            missing.append(names[0])
        for name in names:
            stored.setdefault(name, stored[known[0]] if known else wanted[name])
    if missing or unexpected:
        raise ArtefactError(
            f"{source}: the weights do not fit {type(module).__name__}: "
            f"missing {_few(missing)}; not expected {_few(unexpected)}"
        )
    for name, tensor in wanted.items():
        if stored[name].shape != tensor.shape:
            raise ArtefactError(
                f"{source}: {name}: {type(module).__name__} wants shape {list(tensor.shape)}, "
                f"the file has {list(stored[name].shape)}"
            )
    module.load_state_dict(stored, strict=True)


def shared_names(module: nn.Module) -> list[list[str]]:
    """Return the keys of the module's state dict in groups that name one tensor."""
    groups: dict[object, list[str]] = {}
    for name, value in module.state_dict().items():
        if not isinstance(value, Tensor):
            raise ArtefactError(f"{name}: only tensors can be kept in weights, got {type(value).__name__}")
        place = (value.data_ptr(), value.shape, value.stride(), value.dtype) if value.numel() else name
        groups.setdefault(place, []).append(name)
    return list(groups.values())


def save_weights(module: nn.Module, path: Path | str) -> None:
    """Write the module's parameters and buffers as safetensors, each tied weight once."""
    state = module.state_dict()
    kept = {names[0]: state[names[0]].detach().cpu().contiguous().clone() for names in shared_names(module)}
    Path(path).write_bytes(safetensors.torch.save(kept))


def assert_eval(module: nn.Module) -> None:
    """Raise ArtefactError naming the first module, itself included, that is in training mode."""
    for path, part in module.named_modules():
        if part.training:
            where = f"module {path!r} ({type(part).__name__})" if path else f"{type(part).__name__} itself"
            raise ArtefactError(f"{where} is in training mode; call .eval() on the whole model and do not undo it")


def golden(directory: Path | str, manifest: Manifest) -> Golden:
    """Return the verified golden inputs and outputs. BF16 comes as float32, which holds it exactly."""
    tensors = safetensors.torch.load(manifest.read_verified(directory, manifest.golden))
    arrays = {name: to_numpy(tensor) for name, tensor in tensors.items()}
    try:
        return Golden(
            {spec.name: arrays[f"input.{spec.name}"] for spec in manifest.inputs},
            {spec.name: arrays[f"output.{spec.name}"] for spec in manifest.outputs},
        )
    except KeyError as error:
        raise ArtefactError(f"{Path(directory) / manifest.golden}: no tensor {error.args[0]!r}") from None


def to_numpy(tensor: Tensor) -> np.ndarray[Any, Any]:
    """Return `tensor` as an array on the CPU; BF16, which numpy lacks, as float32."""
    tensor = tensor.detach().cpu()
    array: np.ndarray[Any, Any] = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return array


def _few(names: list[str]) -> str:
    shown = ", ".join(names[:5]) or "nothing"
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown
