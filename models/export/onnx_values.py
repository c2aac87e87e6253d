"""Which value of an ONNX program carries which layer, found by running both on the same inputs.

Translation and fusion leave some layers without a value, and names say little about what is left. So a value stands
for a layer only if the two were the same on every input tried: several batch sizes, lengths and kinds.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from layercast.models.artefact import to_numpy
from layercast.models.examples import KINDS, Examples
from layercast.models.export.exported import EXAMPLE_BATCH
from layercast.models.export.parity import LIMIT, Runner, onnx_runner
from layercast.models.hooks import FeatureExtractor
from layercast.models.layer_names import LayerName
from layercast.models.manifest import LayerSpec
from layercast.models.onnx_cut import CutError, cut, values_of

Array = np.ndarray[Any, Any]
Scopes = Mapping[str, Sequence[str]]
"""Paths of the modules that a value was computed in, outermost first, by the value's name."""

_SAMPLE: Final = 64
"""So many numbers of two arrays are compared before all are: most pairs differ in the first."""


@dataclass
class _Candidates:
    """Values that were equal to one layer on every input so far, and how far they may be from it."""

    names: set[str]
    limit: float


def find(
    module: nn.Module, examples: Examples, layers: Sequence[LayerSpec], content: bytes, scopes: Scopes
) -> dict[str, str]:
    """Return the value of the ONNX model in `content` that carries each layer, by path; without those that have none.

    A layer that is the same for every row is left out, since it could be any other constant, and BF16, which ONNX
    Runtime gives to nobody. Where several values are equal
    to a layer on all inputs, the last one that was computed inside its module carries it, if there is one.
    """
    paths = [layer.path for layer in layers if layer.available and layer.datatype != "BF16"]
    try:
        names = values_of(content)
        found = _alike(module, examples, paths, content, names) if paths and names else {}
        _verify(found, module, examples, content)
    except CutError:
        return {}
    places = {name: place for place, name in enumerate(names)}
    chosen = {path: _choose(path, sorted(alike.names, key=places.__getitem__), scopes) for path, alike in found.items()}
    return {path: name for path, name in chosen.items() if name}


def _alike(
    module: nn.Module, examples: Examples, paths: Sequence[str], content: bytes, names: Sequence[str]
) -> dict[str, _Candidates]:
    """Return the values that may carry each layer, from one run in which rows can be told apart."""
    inputs = examples.make(EXAMPLE_BATCH, examples.lengths()[0])
    values = _named(_runner(content, names), names, inputs)
    found = {}
    for path, layer in _layers(module, inputs, paths).items():
        if layer.size and not np.array_equal(layer, np.broadcast_to(layer[:1], layer.shape), equal_nan=True):
            limit = LIMIT * min(1.0, _spread(layer))
            found[path] = _Candidates({name for name in names if _same(values[name], layer, limit)}, limit)
    return found


def _verify(found: dict[str, _Candidates], module: nn.Module, examples: Examples, content: bytes) -> None:
    """Take from `found` what differs on further inputs."""
    names: list[str] = []
    run: Runner | None = None
    for inputs in _probes(examples):
        left = sorted({name for alike in found.values() for name in alike.names})
        if not left:
            return
        if run is None or left != names:
            names, run = left, _runner(content, left)
        values = _named(run, names, inputs)
        for path, layer in _layers(module, inputs, list(found)).items():
            alike = found[path]
            alike.names = {name for name in alike.names if _same(values[name], layer, alike.limit)}


def _probes(examples: Examples) -> Iterator[Mapping[str, Tensor]]:
    """Make inputs on which a value that only happened to be equal would differ."""
    first, *lengths = examples.lengths()
    yield examples.make(1, first)
    for length in lengths:
        yield examples.make(2, length)
    for kind in KINDS:
        yield examples.make(2, first, kind)


def _choose(path: str, names: Sequence[str], scopes: Scopes) -> str:
    if len(names) == 1:
        return names[0]
    module = LayerName.parse(path).path
    inside = [name for name in names if module in scopes.get(name, ())]
    return inside[-1] if inside else ""


def _layers(module: nn.Module, inputs: Mapping[str, Tensor], paths: Sequence[str]) -> dict[str, Array]:
    with torch.no_grad(), FeatureExtractor(module, ["*"]) as extractor:
        features = extractor.run(**inputs).features
    return {path: to_numpy(features[path]) for path in paths}


def _runner(content: bytes, names: Sequence[str]) -> Runner:
    part = cut(content, names)
    try:
        return onnx_runner(part, names)
    except Exception as error:  # ONNX Runtime's, which share no class; control flow may use what was cut away
        raise CutError("ONNX Runtime refuses what was cut") from error


def _named(run: Runner, names: Sequence[str], inputs: Mapping[str, Tensor]) -> dict[str, Array]:
    return dict(zip(names, run(inputs), strict=True))


def _spread(layer: Array) -> float:
    """Return the standard deviation of the finite numbers of `layer`."""
    values = layer.astype(np.float64)
    values = values[np.isfinite(values)]
    return float(values.std()) if values.size else 0.0


def _same(value: Array, layer: Array, limit: float) -> bool:
    if value.shape != layer.shape or value.dtype != layer.dtype:
        return False
    step = max(1, layer.size // _SAMPLE)
    pairs = ((value.ravel()[::step], layer.ravel()[::step]), (value, layer))
    return all(np.allclose(one, other, rtol=LIMIT, atol=limit, equal_nan=True) for one, other in pairs)
