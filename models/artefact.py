"""Loads an artefact's module and golden values. Weights are safetensors; code that is not ours needs trust."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from layercast.models import registry, state_dicts
from layercast.models.card import Card
from layercast.models.foreign import factory
from layercast.models.foreign.factory import Code
from layercast.models.foreign.trust import Trust
from layercast.models.manifest import WEIGHTS_FILE, Manifest
from layercast.models.state_dicts import shared_names

NO_TRUST: Final = Trust()
"""Layercast's own architectures only."""


class ArtefactError(ValueError):
    """A module cannot be built from what the artefact holds; the text says what was wanted and what came."""


@dataclass(frozen=True)
class Golden:
    """Inputs and the outputs that the exporting machine computed for them, by name."""

    inputs: dict[str, np.ndarray[Any, Any]]
    outputs: dict[str, np.ndarray[Any, Any]]


def load_module(directory: Path | str, manifest: Manifest, trust: Trust = NO_TRUST) -> nn.Module:
    """Build the architecture of `manifest` and load the verified weights into it; on the CPU, in eval mode.

    Code that is not layercast's own runs only if `trust` allows it. Loading is strict and keeps tied weights tied.
    ArtefactError, FactoryError or StateError says what does not fit.
    """
    content = manifest.read_verified(directory, WEIGHTS_FILE)
    code = None
    if manifest.code:
        path = Path(directory) / manifest.code
        code = Code(manifest.code, manifest.read_verified(directory, manifest.code), path)
    module = build(manifest.architecture, manifest.arguments, trust, code)
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


def build(
    architecture: str, arguments: Mapping[str, Any], trust: Trust = NO_TRUST, code: Code | None = None
) -> nn.Module:
    """Construct a registered architecture, or one of another's that `trust` allows: `package.module:factory`, or
    `net.py:Net` from `code`.
    """
    if ":" in architecture:
        return factory.build(architecture, arguments, trust, code)
    try:
        return registry.build(architecture, **arguments)
    except ValueError as error:
        raise ArtefactError(str(error)) from error


def refusal(manifest: Manifest, trust: Trust) -> str:
    """Return why the module of `manifest` may not be built, with the fix, or "" when it may."""
    return trust.refusal(manifest.architecture, bool(manifest.code)) if ":" in manifest.architecture else ""


def load_weights(module: nn.Module, content: bytes, source: Path | str) -> None:
    """Load the safetensors `content` into `module`, strictly; `source` is named in errors.

    A tied weight is stored once, under any of its names.
    """
    try:
        stored = safetensors.torch.load(content)
    except SafetensorError as error:
        raise ArtefactError(f"{source}: not a safetensors file: {error}") from error
    state_dicts.load(module, stored, source)


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
