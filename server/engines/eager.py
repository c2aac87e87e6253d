"""Engine on the `nn.Module` itself: plain predictions, and any layer through forward hooks."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from layercast.models.artefact import to_numpy
from layercast.models.hooks import FeatureExtractor, ReducerError
from layercast.models.manifest import Manifest
from layercast.server.engines.base import Inputs, Outputs
from layercast.server.engines.tensors import to_outputs, to_tensors
from layercast.server.errors import InvalidArgument
from layercast.server.work import Array, Tap


class EagerEngine:
    """Runs the module in inference mode; the one engine that can show what is inside."""

    name = "eager"

    def __init__(self, module: nn.Module, manifest: Manifest, device: torch.device) -> None:
        self.device = device.type
        self._module = module
        self._manifest = manifest
        self._device = device
        self._known = [layer.path for layer in manifest.layers if layer.available]
        self._clone = [layer.path for layer in manifest.layers if layer.clone]

    @property
    def memory_bytes(self) -> int:
        """Bytes of the parameters and buffers, shared ones counted once."""
        return sum(t.nbytes for t in (*self._module.parameters(), *self._module.buffers()))

    def run(self, inputs: Inputs) -> Outputs:
        """Return every output for the batch."""
        with torch.inference_mode():
            result = self._module(**to_tensors(inputs, self._manifest.inputs, self._device))
            return to_outputs(result, self._manifest.outputs)

    def tapped(self, inputs: Inputs, taps: Sequence[Tap], predict: bool) -> tuple[Outputs, dict[Tap, Array]]:
        """Return the outputs (none unless `predict`) and the taps' values from one forward with hooks.

        Without `predict` the forward stops after the deepest executed layer that a tap names. The hooks are gone when
        this returns, also after an error.
        """
        names = {tap: tap.layer if tap.reducer == "none" else f"{tap.layer}@{tap.reducer}" for tap in taps}
        extractor = FeatureExtractor(
            self._module, list(names.values()), known=self._known, clone=self._clone, predictions=predict
        )
        with torch.inference_mode(), extractor:
            tensors = to_tensors(inputs, self._manifest.inputs, self._device)
            try:
                result = extractor.run(**tensors, token_mask=self._token_mask(tensors))
            except ReducerError as error:
                raise InvalidArgument(str(error)) from error
            outputs = to_outputs(result.output, self._manifest.outputs) if predict else {}
            return outputs, {tap: to_numpy(result.features[name]) for tap, name in names.items()}

    def _token_mask(self, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """Return which tokens count, [N, T], for a model with a padded input: reducers leave the others out."""
        return next((tensors[spec.name] != spec.pad for spec in self._manifest.inputs if spec.pad is not None), None)
