"""The layer index: every tensor inside a model that can be tapped, found by running the model."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from layercast.models.datatypes import datatype_of
from layercast.models.examples import Examples
from layercast.models.hook_points import flatten_output, fused_attention_off
from layercast.models.layer_names import LayerName
from layercast.models.manifest import LayerSpec
from layercast.models.torch_attention import WEIGHTS, attention_weights


@dataclass
class _Seen:
    """One returned tensor, watched until its forward is over."""

    tensor: Tensor
    copy: Tensor
    version: int | None
    changed: bool = False

    def settle(self) -> None:
        """Find out whether the tensor was changed after it was returned, then let go of the values."""
        if self.version is None or self.tensor._version != self.version:
            self.changed = True
        else:  # changes through .data or by code outside torch leave the version alone
            self.changed = not torch.equal(_bits(self.tensor), _bits(self.copy))
        self.tensor = self.copy = torch.empty(self.tensor.shape, dtype=self.tensor.dtype, device="meta")


@dataclass
class _Run:
    """One forward: what every module returned, in order of completion."""

    batch: int
    tensors: dict[LayerName, _Seen]
    calls: Counter[str]
    others: dict[str, str]
    unweighted: dict[LayerName, None] = field(default_factory=dict)


def build_index(module: nn.Module, examples: Examples) -> list[LayerSpec]:
    """Run `module` (in eval mode) on examples and describe every module inside it, in order of execution.

    Three batch sizes and, with dynamic inputs, two lengths tell the batch and the dynamic dimensions (-1) from fixed
    ones. Tensors whose rows are not the batch's, modules that never run and outputs that are no tensors are listed as
    not available, with the reason.
    """
    first, *further = examples.lengths()
    trials = [(2, first), (3, first), (1, first), *((2, length) for length in further[:1])]
    with torch.no_grad(), fused_attention_off():
        runs = [_run(module, examples, batch, length) for batch, length in trials]
    specs = [_spec(module, name, order, runs) for order, name in enumerate(runs[0].tensors)]
    specs += [_unweighted(module, name, runs[0]) for name in runs[0].unweighted]
    ran = {name.path for name in runs[0].tensors}
    specs += [_absent(path, part, runs) for path, part in module.named_modules() if path and path not in ran]
    return specs


def names_given(module: nn.Module, inputs: Mapping[str, Tensor]) -> set[str]:
    """Run `module` once and return the names, as in an index, of all tensors that the modules inside returned."""
    calls: Counter[str] = Counter()
    names: set[LayerName] = set()

    def watch(path: str) -> Callable[[nn.Module, Any, Any, Any], None]:
        def note(part: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            parts = [key for key, _ in flatten_output(output)]
            if attention_weights(part, args, kwargs) is not None:
                parts.append(WEIGHTS)
            names.update(LayerName(path, calls[path], key) for key in parts)
            calls[path] += 1

        return note

    handles = [
        part.register_forward_hook(watch(path), with_kwargs=True) for path, part in module.named_modules() if path
    ]
    try:
        with torch.inference_mode(), fused_attention_off():
            module(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return {name.text(repeated=calls[name.path] > 1) for name in names}


def _run(module: nn.Module, examples: Examples, batch: int, length: int) -> _Run:
    run = _Run(batch, {}, Counter(), {})
    handles = [
        part.register_forward_hook(_watch(run, path), with_kwargs=True) for path, part in module.named_modules() if path
    ]
    try:
        module(**examples.make(batch, length))
        for seen in run.tensors.values():
            seen.settle()
    finally:
        for handle in handles:
            handle.remove()
    return run


def _watch(run: _Run, path: str) -> Callable[[nn.Module, Any, Any, Any], None]:
    def watch(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        call = run.calls[path]
        run.calls[path] += 1
        found = list(flatten_output(output))
        if not found:
            run.others[path] = f"returns {type(output).__name__}, not a tensor"
        weights = attention_weights(module, args, kwargs)
        if weights is not None:
            found.append((WEIGHTS, weights))
        elif isinstance(output, tuple) and "attention" in type(module).__name__.lower():
            run.unweighted |= {LayerName(path, call, f"[{at}]"): None for at, item in enumerate(output) if item is None}
        for part, tensor in found:
            version = None if tensor.is_inference() else tensor._version
            run.tensors[LayerName(path, call, part)] = _Seen(tensor, tensor.detach().clone(), version)

    return watch


def _spec(module: nn.Module, name: LayerName, order: int, runs: list[_Run]) -> LayerSpec:
    part = module.get_submodule(name.path)
    text = name.text(repeated=runs[0].calls[name.path] > 1)
    kind, parameters = type(part).__name__, parameter_count(part)
    shapes = [tuple(run.tensors[name].tensor.shape) if name in run.tensors else None for run in runs]
    reason = _refusal(shapes, [run.batch for run in runs])
    dtype = runs[0].tensors[name].tensor.dtype
    datatype = datatype_of(dtype)
    if datatype is None:
        reason = f"values of {dtype} cannot be sent"
    if reason:
        return LayerSpec(path=text, type=kind, parameters=parameters, available=False, reason=reason)
    known = [shape for shape in shapes if shape is not None]
    varies = [len({shape[index] for shape in known}) > 1 for index in range(len(known[0]))]
    return LayerSpec(
        path=text,
        type=kind,
        shape=tuple(-1 if vary else size for vary, size in zip(varies, known[0], strict=True)),
        datatype=datatype or "",
        order=order,
        parameters=parameters,
        clone=any(run.tensors[name].changed for run in runs),
    )


def _refusal(shapes: list[tuple[int, ...] | None], batches: list[int]) -> str:
    """Return why a tensor of these shapes, in runs of these batch sizes, cannot be tapped; "" if it can."""
    if None in shapes:
        return "it runs for some inputs only"
    known = [shape for shape in shapes if shape is not None]
    seen = " and ".join(f"{list(shape)} at batch {batch}" for shape, batch in zip(known[:3], batches, strict=False))
    if len({len(shape) for shape in known}) > 1:
        return f"its number of dimensions changes: {seen}"
    if any(not shape or shape[0] != batch for shape, batch in zip(known, batches, strict=True)):
        return f"dimension 0 is not the batch: {seen}"
    if any(size != other for size, other in zip(known[0][1:], known[1][1:], strict=True)):
        return f"a dimension besides the first depends on the batch: {seen}"
    return ""


def _unweighted(module: nn.Module, name: LayerName, run: _Run) -> LayerSpec:
    part = module.get_submodule(name.path)
    return LayerSpec(
        path=name.text(repeated=run.calls[name.path] > 1),
        type=type(part).__name__,
        parameters=parameter_count(part),
        available=False,
        reason="it is None: this attention does not give its weights; build a transformers model with "
        "attn_implementation='eager' to have them",
    )


def _absent(path: str, part: nn.Module, runs: list[_Run]) -> LayerSpec:
    if path in runs[0].others:
        reason = runs[0].others[path]
    elif any(path in run.others or run.calls[path] for run in runs):
        reason = "it runs for some inputs only"
    elif type(part).forward is nn.Module.forward:
        reason = "a container: it has no forward of its own"
    else:
        reason = "never called in eval mode: its parent computes without calling it"
    return LayerSpec(
        path=path, type=type(part).__name__, parameters=parameter_count(part), available=False, reason=reason
    )


def parameter_count(module: nn.Module) -> int:
    """Return the number of values in the module's parameters, shared ones counted once."""
    return sum(parameter.numel() for parameter in module.parameters())


def _bits(tensor: Tensor) -> Tensor:
    """Return a tensor that compares equal to another exactly if the values do, NaN included."""
    return torch.nan_to_num(tensor, nan=0.0) if tensor.is_floating_point() else tensor
