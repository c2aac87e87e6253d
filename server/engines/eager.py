"""Engine on the `nn.Module` itself: plain predictions, and any layer through forward hooks."""

import copy
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import nn

from layercast.models.artefact import to_numpy
from layercast.models.edits import Edit, Planned, Request, SteeringError, plan
from layercast.models.explain import ExplainError, Explanation, explain
from layercast.models.explain.inputs import Inputs as ExplainInputs
from layercast.models.explain.subject import Progress
from layercast.models.hook_points import hook_count
from layercast.models.hooks import FeatureExtractor, LayerError, ReducerError
from layercast.models.layer_index import names_given
from layercast.models.manifest import Manifest
from layercast.models.steering import Placed, steered
from layercast.server.engines.base import Inputs, Outputs
from layercast.server.engines.tensors import to_outputs, to_tensors, token_mask
from layercast.server.errors import InvalidArgument
from layercast.server.work import Array, Tap

_EXTRACTORS_KEPT: Final = 64


class EagerEngine:
    """Runs the module in inference mode; the one engine that can show what is inside."""

    name = "eager"

    def __init__(self, module: nn.Module, manifest: Manifest, device: torch.device) -> None:
        self.device = device.type
        self._module = module
        self.manifest = manifest
        self._device = device
        self._known = [layer.path for layer in manifest.layers if layer.available]
        self._clone = [layer.path for layer in manifest.layers if layer.clone]
        self._order = {layer.path: layer.order for layer in manifest.layers if layer.available}
        self._extractors: OrderedDict[tuple[tuple[str, ...], bool], FeatureExtractor] = OrderedDict()
        self._explained = _double(module)
        self._own_hooks = self._hook_count()
        self.on_stopped: Callable[[float], None] = lambda skipped: None
        """Told, in the thread that runs, of a forward that stopped early: the share of layers that did not run."""

    @property
    def memory_bytes(self) -> int:
        """Bytes of the parameters and buffers, shared ones counted once."""
        return sum(t.nbytes for t in (*self._module.parameters(), *self._module.buffers()))

    @property
    def hooks(self) -> int:
        """Hooks on the module now, those that are its own left out; 0 while nothing runs."""
        return self._hook_count() - self._own_hooks

    def run(self, inputs: Inputs) -> Outputs:
        """Return every output for the batch."""
        with torch.inference_mode():
            result = self._module(**to_tensors(inputs, self.manifest.inputs, self._device))
            return to_outputs(result, self.manifest.outputs)

    def tapped(
        self, inputs: Inputs, taps: Sequence[Tap], predict: bool, edits: Sequence[Placed] = ()
    ) -> tuple[Outputs, dict[Tap, Array]]:
        """Return the outputs (none unless `predict`) and the taps' values from one forward with hooks.

        Without `predict` the forward stops after the deepest executed layer that a tap names. `edits` change layers for
        the rows that they come with; taps see what they made. The hooks are gone when this returns, also after an
        error.
        """
        names = {tap: tap.layer if tap.reducer == "none" else f"{tap.layer}@{tap.reducer}" for tap in taps}
        extractor = self._extractor(tuple(sorted(names.values())), predict)
        try:
            with torch.inference_mode():
                tensors = to_tensors(inputs, self.manifest.inputs, self._device)
                mask = token_mask(self.manifest.inputs, tensors)
                # Their hooks come first, so that those of the taps are given the edited values.
                with steered(self._module, edits, mask), extractor:
                    result = extractor.run(**tensors, token_mask=mask)
                outputs = to_outputs(result.output, self.manifest.outputs) if predict else {}
        except (ReducerError, SteeringError) as error:
            raise InvalidArgument(str(error)) from error
        finally:
            extractor.release()
        if result.stopped_early:
            deepest = max(self._order[tap.layer] for tap in taps)
            self.on_stopped(1 - (deepest + 1) / (max(self._order.values()) + 1))
        return outputs, {tap: to_numpy(result.features[name]) for tap, name in names.items()}

    def _extractor(self, names: tuple[str, ...], predict: bool) -> FeatureExtractor:
        """Return an extractor for the taps `names`, kept for the next batch: making one takes up to milliseconds."""
        found = self._extractors.pop((names, predict), None) or FeatureExtractor(
            self._module, names, known=self._known, clone=self._clone, predictions=predict
        )
        self._extractors[names, predict] = found
        if len(self._extractors) > _EXTRACTORS_KEPT:
            self._extractors.popitem(last=False)
        return found

    def _hook_count(self) -> int:
        doubled = hook_count(self._explained) if isinstance(self._explained, nn.Module) else 0
        return hook_count(self._module) + doubled

    def given(self, inputs: Inputs) -> set[str]:
        """Return the names of the layers that give a value in one forward of `inputs`."""
        return names_given(self._module, to_tensors(inputs, self.manifest.inputs, self._device))

    def plan(self, edit: Edit, request: Request) -> Planned:
        """Return `edit` as it is made in this model; SteeringError for one that can't be."""
        return plan(self._module, self.manifest.layers_by_path, edit, request)

    def explain(
        self, inputs: Inputs, method: str, targets: int | Sequence[int] | None, progress: Progress, **arguments: Any
    ) -> Explanation:
        """Return the explanation of a batch; may run in any one thread while another runs batches.

        `targets` and `arguments` are those of `models.explain.explain`. InvalidArgument for what it refuses.
        """
        if isinstance(self._explained, Exception):
            raise InvalidArgument(f"this model can't be explained, since its module can't be copied: {self._explained}")
        tensors = to_tensors(inputs, self.manifest.inputs, self._device)
        try:
            of = ExplainInputs(tensors, arguments.get("of")).of
            mask = token_mask(self.manifest.inputs, {of: tensors[of]})
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
