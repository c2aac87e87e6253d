"""Layers read from the ONNX program: values inside it become outputs of a part of it that ends at the deepest one."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from layercast.models.artefact import to_numpy
from layercast.models.manifest import LayerSpec, Manifest
from layercast.models.onnx_cut import cut
from layercast.models.reducers import ReducerError, reduce
from layercast.proto.codec import DATATYPES
from layercast.server.engines.base import Inputs, Outputs
from layercast.server.engines.onnx import open_session
from layercast.server.engines.tensors import to_tensors, token_mask
from layercast.server.errors import InvalidArgument, ModelFailed
from layercast.server.work import Array, Tap

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class OnnxProgram:
    """The ONNX program of an artefact, which parts are cut from as they are needed."""

    directory: Path
    manifest: Manifest
    threads: int

    @property
    def layers(self) -> Collection[str]:
        """The layers that have a value in it."""
        return self.manifest.onnx_values.keys()

    @property
    def bytes(self) -> int:
        """Size of the whole."""
        return self.manifest.files[self.manifest.programs["onnx"]].bytes

    def part(self, layers: Collection[str], predict: bool) -> "OnnxTaps":
        """Cut and compile the part that gives `layers`, and the outputs if `predict`; takes milliseconds to seconds.

        Raises ManifestError for a file that is no more what was loaded, CutError, ImportError without `onnx`, and
        EngineError when ONNX Runtime refuses the part.
        """
        name = self.manifest.programs["onnx"]
        content = self.manifest.read_verified(self.directory, name)
        values = {path: self.manifest.onnx_values[path] for path in layers}
        outputs = [spec.name for spec in self.manifest.outputs] if predict else []
        skipped = 0.0 if predict else self._skipped(layers)
        return OnnxTaps(cut(content, list(dict.fromkeys([*outputs, *values.values()]))), self, values, skipped)

    def _skipped(self, layers: Collection[str]) -> float:
        """Return the share of the model's layers that come after the deepest of `layers`."""
        known = self.manifest.layers_by_path
        last = max(layer.order for layer in known.values())
        return 1 - (max(known[path].order for path in layers) + 1) / (last + 1)


class OnnxTaps:
    """A part of the program that gives the layers whose `values` it was cut for.

    `skipped` is the share of the model's layers that it leaves out, since they come after the deepest of these.
    """

    name = "onnx"

    def __init__(self, content: bytes, program: OnnxProgram, values: Mapping[str, str], skipped: float) -> None:
        manifest = program.manifest
        self.skipped = skipped
        self.bytes = len(content)
        self._manifest = manifest
        self._values = values
        self._session = open_session(content, manifest.programs["onnx"], program.threads)

    def tapped(self, inputs: Inputs, taps: Sequence[Tap], predict: bool) -> tuple[Outputs, dict[Tap, Array]]:
        """Return the outputs (none unless `predict`) and the taps' values, reduced as hooks on the module reduce them.

        ModelFailed for a value that is not what the layer index says.
        """
        outputs = [spec.name for spec in self._manifest.outputs] if predict else []
        names = list(dict.fromkeys([*outputs, *(self._values[tap.layer] for tap in taps)]))
        found = dict(zip(names, self._session.run(names, dict(inputs)), strict=True))
        with torch.inference_mode():
            padded = [spec for spec in self._manifest.inputs if spec.pad is not None]
            mask = token_mask(padded, to_tensors(inputs, padded, _CPU))
            features = {tap: self._reduced(found[self._values[tap.layer]], tap, mask) for tap in taps}
        return {name: found[name] for name in outputs}, features

    def _reduced(self, value: Array, tap: Tap, mask: torch.Tensor | None) -> Array:
        _check(value, self._manifest.layers_by_path[tap.layer])
        try:
            return to_numpy(reduce(torch.from_numpy(value), tap.reducer, mask))
        except ReducerError as error:
            raise InvalidArgument(f"layer {tap.layer}: {error}") from error


def _check(value: Array, layer: LayerSpec) -> None:
    """Refuse a value that is not the layer's by its shape or type: its name comes from a file that anyone may write."""
    wanted = layer.shape
    fits = value.ndim == len(wanted) and all(
        size in (-1, got) for size, got in zip(wanted[1:], value.shape[1:], strict=True)
    )
    if not fits or value.dtype != DATATYPES.get(layer.datatype):
        raise ModelFailed(
            f"layer {layer.path!r}: want {layer.datatype} {list(wanted)}, its value in the ONNX program is "
            f"{value.dtype} {list(value.shape)}"
        )
