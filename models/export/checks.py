"""What a module must be before it is exported. Each refusal names the module inside that is at fault."""

from inspect import Parameter as _Parameter
from inspect import signature
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from layercast.models.artefact import assert_eval
from layercast.models.card import Card
from layercast.models.datatypes import datatype_of
from layercast.models.examples import Examples
from layercast.models.export.positional import named_outputs
from layercast.models.hooks import FeatureExtractor, registered_hooks
from layercast.models.manifest import LayerSpec

_ROW_LIMIT = 1e-3
"""How far a row may move with its neighbours: other kernels sum in another order, which is not this much."""


class ExportError(ValueError):
    """The model cannot be exported as it is; the text names the model, the module inside it and the likely fix."""


def check_state(module: nn.Module, card: Card) -> None:
    """Refuse training mode, hooks, parameters without values, and batch norm that would use the batch's statistics."""
    try:
        assert_eval(module)
    except ValueError as error:
        raise ExportError(f"{card.name}: {error}") from None
    hooked = registered_hooks(module)
    if hooked:
        raise ExportError(
            f"{card.name}: {describe(module, hooked[0])} still holds a hook; remove it (handle.remove()) before export"
        )
    for path, part in module.named_modules():
        if isinstance(part, _BatchNorm) and (part.running_mean is None or part.running_var is None):
            raise ExportError(
                f"{card.name}: {describe(module, path)} has no running statistics, so a row's answer would depend on "
                f"the other rows of its batch; train it with track_running_stats=True"
            )
        if any(isinstance(value, nn.parameter.UninitializedParameter) for value in part.parameters(recurse=False)):
            raise ExportError(f"{card.name}: {describe(module, path)} has no weights yet; run the model once first")


def check_interface(module: nn.Module, card: Card, examples: Examples) -> None:
    """Refuse a card whose inputs and outputs are not those of `forward`."""
    parameters = signature(module.forward).parameters
    kinds = {name: parameter.kind for name, parameter in parameters.items()}
    named = {name for name, kind in kinds.items() if kind not in (_Parameter.VAR_POSITIONAL, _Parameter.VAR_KEYWORD)}
    needed = {name for name in named if parameters[name].default is _Parameter.empty}
    inputs = [spec.name for spec in card.inputs]
    if needed - set(inputs) or (set(inputs) - named and _Parameter.VAR_KEYWORD not in kinds.values()):
        raise ExportError(f"{card.name}: the card's inputs are {inputs}, forward takes {list(parameters)}")
    for batch in (1, 2):
        result = _forward(module, card, examples.make(batch), batch)
        try:
            outputs = named_outputs(result, [spec.name for spec in card.outputs])
        except ValueError as error:
            raise ExportError(f"{card.name}: {error}") from None
        for spec in card.outputs:
            value = outputs[spec.name]
            if not _fits(value, batch, spec.shape) or datatype_of(value.dtype) != spec.datatype:
                raise ExportError(
                    f"{card.name}: output {spec.name!r}: the card says {spec.datatype} {list(spec.shape)}, at batch "
                    f"{batch} the model gives {datatype_of(value.dtype) or value.dtype} {list(value.shape)}"
                )


def check_rows(module: nn.Module, card: Card, examples: Examples, layers: list[LayerSpec]) -> None:
    """Refuse a model in which a row's answer depends on the other rows of its batch, naming the first such layer."""
    names = [spec.name for spec in card.outputs]
    rows = examples.make(5)
    with torch.no_grad():
        together = named_outputs(module(**rows), names)
        again = named_outputs(module(**rows), names)
        single = [{name: value[index : index + 1] for name, value in rows.items()} for index in range(5)]
        alone = [named_outputs(module(**row), names) for row in single]
    for name in names:
        if _apart(together[name], [again[name]]):
            raise ExportError(
                f"{card.name}: output {name!r} is another when the same rows come again, first in "
                f"{_first_apart(module, rows, [rows], layers)}; a program must answer alike (no noise outside "
                f"training, no state that a forward changes)"
            )
        if _apart(together[name], [outputs[name] for outputs in alone]):
            raise ExportError(
                f"{card.name}: output {name!r} of a row depends on the other rows of its batch, first in "
                f"{_first_apart(module, rows, single, layers)}; compute per row (no mean or norm over dimension 0)"
            )


def module_at(error: BaseException, module: nn.Module) -> str:
    """Return a description of the innermost module of `module` whose forward was running when `error` was raised."""
    paths = {id(part): path for path, part in module.named_modules()}
    found, trace = "", error.__traceback__
    while isinstance(trace, TracebackType):
        running = trace.tb_frame.f_locals.get("self")
        if isinstance(running, nn.Module):
            found = paths.get(id(running), found)
        trace = trace.tb_next
    return describe(module, found)


def describe(module: nn.Module, path: str) -> str:
    """Return how messages name the module at `path` ("" is `module` itself)."""
    if not path:
        return f"{type(module).__name__} itself"
    return f"module {path!r} ({type(module.get_submodule(path)).__name__})"


def _forward(module: nn.Module, card: Card, inputs: dict[str, Tensor], batch: int) -> Any:
    try:
        with torch.no_grad():
            return module(**inputs)
    except Exception as error:
        raise ExportError(
            f"{card.name}: at batch {batch}, with inputs made from the card, {module_at(error, module)} fails: "
            f"{type(error).__name__}: {error}"
        ) from error


def _fits(value: Tensor, batch: int, shape: tuple[int, ...]) -> bool:
    wanted = (batch, *shape[1:])
    return value.dim() == len(wanted) and all(
        want in (-1, size) for want, size in zip(wanted, value.shape, strict=True)
    )


def _apart(together: Tensor, alone: list[Tensor]) -> bool:
    single = torch.cat(alone)
    if single.shape != together.shape:
        return True
    return not torch.allclose(single.double(), together.double(), rtol=_ROW_LIMIT, atol=_ROW_LIMIT, equal_nan=True)


def _first_apart(
    module: nn.Module, rows: dict[str, Tensor], parts: list[dict[str, Tensor]], layers: list[LayerSpec]
) -> str:
    """Return the first layer that gives other values for `rows` together than for the `parts` that they consist of."""
    names = [layer.path for layer in layers if layer.available]
    if names:
        with torch.no_grad(), FeatureExtractor(module, names) as extractor:
            together = extractor.run(**rows).features
            alone = [extractor.run(**part).features for part in parts]
        for layer in layers:
            if layer.available and _apart(together[layer.path], [features[layer.path] for features in alone]):
                return f"{layer.path!r} ({layer.type})"
    return describe(module, "")
