"""Engine on the `nn.Module` itself: plain predictions, and any layer through forward hooks."""

import copy
import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final

import torch
from torch import Tensor, nn

from layercast.models.edits import Edit, Planned, Request, SteeringError, plan
from layercast.models.explain import ExplainError, Explanation, explain
from layercast.models.explain.inputs import Inputs as ExplainInputs
from layercast.models.explain.subject import Progress
from layercast.models.hook_points import hook_count
from layercast.models.hooks import FeatureExtractor, LayerError, ReducerError
from layercast.models.layer_index import names_given
from layercast.models.manifest import LayerSpec, Manifest
from layercast.models.steering import Placed, steered
from layercast.server import memory
from layercast.server.engines import place
from layercast.server.engines.base import Inputs, Outputs
from layercast.server.engines.choice import Buckets
from layercast.server.engines.golden import Tolerance
from layercast.server.engines.graphs import Graphs, NotCaptured, capture
from layercast.server.engines.place import OnCard, Tensors
from layercast.server.engines.tensors import as_declared, by_name, to_tensors, token_mask
from layercast.server.errors import InvalidArgument
from layercast.server.settings import Precision
from layercast.server.work import Array, Tap

logger = logging.getLogger(__name__)

_EXTRACTORS_KEPT: Final = 64


class EagerEngine:
    """Runs the module in inference mode; the one engine that can show what is inside.

    With the precision `bf16`, matrix products and convolutions are computed in BF16 (torch.autocast).
    """

    name = "eager"

    def __init__(
        self, module: nn.Module, manifest: Manifest, device: torch.device, precision: Precision = "fp32"
    ) -> None:
        self._place = place.at(device, manifest.inputs)
        self.device = self._place.kind
        self._module = module.to(self._place.device)
        self.manifest = manifest
        self._precision = precision
        self._graphs: Graphs | None = None
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
        if self._graphs and isinstance(self._place, OnCard) and (graph := self._graphs.fitting(inputs)):
            return self._place.replay(graph, inputs)
        return self._place.run(inputs, self._forward)

    def capture(self, buckets: Buckets) -> None:
        """On a card, record the forward as CUDA graphs, which run plain batches from then on; log why if that fails."""
        if not isinstance(self._place, OnCard):
            return
        manifest, agree = self.manifest, Tolerance(self._precision).agree
        try:
            self._graphs = capture(self._place, self._forward, manifest.inputs, manifest.outputs, buckets, agree)
            return
        except NotCaptured as error:
            logger.warning("%s: no CUDA graphs, every batch runs layer by layer: %s", manifest.name, error)
        memory.release()  # of what was recorded so far, which the error held

    def share_parameters(self, other: "EagerEngine") -> None:
        """Compute with the parameters of `other`, on a module that was built and loaded as this one's.

        Buffers stay its own: a forward may write to them.
        """
        theirs = dict(other._module.named_parameters(remove_duplicate=False))
        for name, parameter in self._module.named_parameters(remove_duplicate=False):
            if (same := theirs.get(name)) is not None and same.shape == parameter.shape:
                parameter.data = same.data

    def forget_graphs(self) -> None:
        """Give back the memory of the CUDA graphs."""
        self._graphs = None

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
        stopped: list[bool] = []

        def forward(tensors: Tensors) -> dict[str | Tap, Tensor]:
            mask = token_mask(self.manifest.inputs, tensors)
            # Their hooks come first, so that those of the taps are given the edited values.
            with self._autocast(), steered(self._module, edits, mask), extractor:
                result = extractor.run(**tensors, token_mask=mask)
            stopped.append(result.stopped_early)
            values: dict[str | Tap, Tensor] = {tap: result.features[name] for tap, name in names.items()}
            if predict:
                values.update(self._outputs(result.output))
            return values

        try:
            arrays = self._place.run(inputs, forward)
        except (ReducerError, SteeringError) as error:
            raise InvalidArgument(str(error)) from error
        finally:
            extractor.release()
        if any(stopped):
            deepest = max(self._order[tap.layer] for tap in taps)
            self.on_stopped(1 - (deepest + 1) / (max(self._order.values()) + 1))
        features = {tap: arrays.pop(tap) for tap in names}
        return {name: array for name, array in arrays.items() if isinstance(name, str)}, features

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
        return names_given(self._module, to_tensors(inputs, self.manifest.inputs, self._place.device))

    def plan(self, layers: Mapping[str, LayerSpec], edit: Edit, request: Request) -> Planned:
        """Return `edit` as it is made in this model; SteeringError for one that can't be, or that `layers` keep back.

        They are the layers as they are served, which may be fewer than the engine could show.
        """
        return plan(self._module, layers, edit, request)

    def explain(
        self, inputs: Inputs, method: str, targets: int | Sequence[int] | None, progress: Progress, **arguments: Any
    ) -> Explanation:
        """Return the explanation of a batch; may run in any one thread while another runs batches.

        `targets` and `arguments` are those of `models.explain.explain`. InvalidArgument for what it refuses.
        """
        if isinstance(self._explained, Exception):
            raise InvalidArgument(f"this model can't be explained, since its module can't be copied: {self._explained}")
        tensors = to_tensors(inputs, self.manifest.inputs, self._place.device)
        try:
            of = ExplainInputs(tensors, arguments.get("of")).of
            mask = token_mask(self.manifest.inputs, {of: tensors[of]})
            return explain(self._explained, tensors, method, targets, token_mask=mask, progress=progress, **arguments)
        except (ExplainError, LayerError) as error:
            raise InvalidArgument(str(error)) from error

    def _forward(self, tensors: Tensors) -> dict[str, Tensor]:
        with self._autocast():
            result = self._module(**tensors)
        return self._outputs(result)

    def _outputs(self, result: object) -> dict[str, Tensor]:
        named = by_name(result, self.manifest.outputs)
        return as_declared(named, self.manifest.outputs) if self._precision == "bf16" else named

    def _autocast(self) -> AbstractContextManager[Any]:
        # A cache of converted weights would be part of a captured graph, and gone when it is replayed.
        if self._precision == "fp32":
            return nullcontext()
        return torch.autocast(self._place.device.type, torch.bfloat16, cache_enabled=False)


def _double(module: nn.Module) -> nn.Module | Exception:
    """Return the module again with the same parameters, or why it can't be had.

    Hooks on it, and what its forward writes to buffers, don't touch batches that run on the other meanwhile. Made at
    once, when no batch has hooks on it.
    """
    memo: dict[int, Any] = {id(parameter): parameter for parameter in module.parameters()}
    try:
        return copy.deepcopy(module, memo)
    except Exception as error:  # tensors that are computed, things that have no copy, code that is anyone's
        return error
