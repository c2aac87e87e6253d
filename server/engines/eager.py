"""Engine on the `nn.Module` itself: plain predictions, and any layer through forward hooks."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from layercast.models.artefact import to_numpy
from layercast.models.edits import Edit, Planned, Request, SteeringError, plan
from layercast.models.explain import ExplainError, Explanation, explain
from layercast.models.explain.inputs import Inputs as ExplainInputs
from layercast.models.explain.subject import Progress
from layercast.models.hooks import FeatureExtractor, LayerError, ReducerError
from layercast.models.manifest import Manifest
from layercast.models.steering import Placed, steered
from layercast.server.engines.base import Inputs, Outputs
from layercast.server.engines.tensors import to_outputs, to_tensors, token_mask
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
        self._explained = _double(module)

    @property
    def memory_bytes(self) -> int:
        """Bytes of the parameters and buffers, shared ones counted once."""
        return sum(t.nbytes for t in (*self._module.parameters(), *self._module.buffers()))

    def run(self, inputs: Inputs) -> Outputs:
        """Return every output for the batch."""
        with torch.inference_mode():
            result = self._module(**to_tensors(inputs, self._manifest.inputs, self._device))
            return to_outputs(result, self._manifest.outputs)

    def tapped(
        self, inputs: Inputs, taps: Sequence[Tap], predict: bool, edits: Sequence[Placed] = ()
    ) -> tuple[Outputs, dict[Tap, Array]]:
        """Return the outputs (none unless `predict`) and the taps' values from one forward with hooks.

        Without `predict` the forward stops after the deepest executed layer that a tap names. `edits` change layers for
        the rows that they come with; taps see what they made. The hooks are gone when this returns, also after an
        error.
        """
        names = {tap: tap.layer if tap.reducer == "none" else f"{tap.layer}@{tap.reducer}" for tap in taps}
        extractor = FeatureExtractor(
            self._module, list(names.values()), known=self._known, clone=self._clone, predictions=predict
        )
        with torch.inference_mode():
            tensors = to_tensors(inputs, self._manifest.inputs, self._device)
            mask = token_mask(self._manifest.inputs, tensors)
            try:
                # Their hooks come first, so that those of the taps are given the edited values.
                with steered(self._module, edits, mask), extractor:
                    result = extractor.run(**tensors, token_mask=mask)
            except (ReducerError, SteeringError) as error:
                raise InvalidArgument(str(error)) from error
            outputs = to_outputs(result.output, self._manifest.outputs) if predict else {}
            return outputs, {tap: to_numpy(result.features[name]) for tap, name in names.items()}

    def plan(self, edit: Edit, request: Request) -> Planned:
        """Return `edit` as it is made in this model; SteeringError for one that can't be."""
        return plan(self._module, self._manifest.layers_by_path, edit, request)

    def explain(
        self, inputs: Inputs, method: str, targets: int | Sequence[int] | None, progress: Progress, **arguments: Any
    ) -> Explanation:
        """Return the explanation of a batch; may run in any one thread while another runs batches.

        `targets` and `arguments` are those of `models.explain.explain`. InvalidArgument for what it refuses.
        """
        if isinstance(self._explained, Exception):
            raise InvalidArgument(f"this model can't be explained, since its module can't be copied: {self._explained}")
        tensors = to_tensors(inputs, self._manifest.inputs, self._device)
        try:
            of = ExplainInputs(tensors, arguments.get("of")).of
            mask = token_mask(self._manifest.inputs, {of: tensors[of]})
            return explain(self._explained, tensors, method, targets, token_mask=mask, progress=progress, **arguments)
        except (ExplainError, LayerError) as error:
            raise InvalidArgument(str(error)) from error


def _double(module: nn.Module) -> nn.Module | Exception:
    """Return the module again with the same parameters and buffers, or why it can't be had.

    Hooks on it don't touch batches that run on the other meanwhile. Made at once, when no batch has hooks on it.
    """
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    try:
        return copy.deepcopy(module, memo)
    except Exception as error:  # tensors that are computed, things that have no copy, code that is anyone's
        return error
