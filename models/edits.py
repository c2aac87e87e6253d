"""Edits: what is changed in a layer's values, checked against the layer before anything runs.

    edit = Edit("layer1.0", Zero(), channels=(3, 5))
    planned = plan(model, manifest.layers_by_path, edit, Request(rows=2))

`steering.steered` makes planned edits in a forward.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from torch import nn

from layercast.models.layer_names import LayerName, nearest
from layercast.models.layers.attention import MultiHeadAttention
from layercast.models.manifest import LayerSpec
from layercast.models.torch_attention import WEIGHTS

_LARGEST: Final = {"FP16": 65504.0, "BF16": 3.38e38, "FP32": 3.4028234e38, "FP64": math.inf}
"""Numbers that a layer's datatype holds; no other datatype can be edited."""


class SteeringError(ValueError):
    """An edit that can't be made. `field` is the part of the edit that is at fault, as in `channels[1]`; "" for all."""

    def __init__(self, message: str, field: str = "") -> None:
        super().__init__(message)
        self.field = field


@dataclass(frozen=True, slots=True)
class Zero:
    """Put zeros there, as in the pruning of heads (Michel et al. 2019)."""


@dataclass(frozen=True, slots=True)
class Scale:
    """Multiply by `factor`."""

    factor: float


@dataclass(frozen=True, slots=True)
class Add:
    """Add a vector: one number for each unit or channel that is changed, in the order named."""

    vector: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Clamp:
    """Move values below `low` up to it, and those above `high` down; None for no bound."""

    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class Mean:
    """Put a unit's mean there, taken over the rows that are edited together and over all positions but padding.

    Mean ablation (Wang et al. 2022) with the request's own rows for its reference distribution.
    """


Action = Zero | Scale | Add | Clamp | Mean


@dataclass(frozen=True, slots=True)
class Edit:
    """A change of what the layer named `layer` returns; empty selections stand for everything.

    `units` are of the last dimension of [N, F] and [N, T, D], `channels` of dimension 1 of [N, C, …], `heads` of our
    MultiHeadAttention; at most one of the three. `positions` are tokens that are not padding, or with `channels` and in
    a layer of four dimensions or more places in space, row by row.
    """

    layer: str
    action: Action
    units: tuple[int, ...] = ()
    channels: tuple[int, ...] = ()
    heads: tuple[int, ...] = ()
    positions: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Request:
    """The rows that an edit is for: how many, how long (None where no dimension is dynamic), tokens in each.

    `tokens` counts those that are not padding; None for a model without padding.
    """

    rows: int
    length: int | None = None
    tokens: Sequence[int] | None = None


@dataclass(frozen=True, slots=True)
class Planned:
    """An edit that fits its layer.

    It changes part `name.part` of what call `name.call` of the module at `name.path` returns, or with `before` what it
    is given: values of `shape`, whose dimension 0 is not looked at. `units` (None for all) are along dimension
    `unit_dimension`, `positions` (None for all) along the others; `masked` says that they are those of the token mask.
    """

    name: LayerName
    before: bool
    shape: tuple[int, ...]
    action: Action
    unit_dimension: int
    units: tuple[int, ...] | None
    positions: tuple[int, ...] | None
    masked: bool

    @property
    def position_dimensions(self) -> tuple[int, ...]:
        """The dimensions besides the rows and the units."""
        return tuple(at for at in range(1, len(self.shape)) if at != self.unit_dimension)


def plan(model: nn.Module, layers: Mapping[str, LayerSpec], edit: Edit, request: Request) -> Planned:
    """Return `edit` as it is made in `model`, whose layer index is `layers`; SteeringError for one that can't be."""
    spec = _layer(layers, edit.layer)
    shape = (request.rows, *((request.length or 1) if size == -1 else size for size in spec.shape[1:]))
    if len(shape) < 2:
        raise SteeringError(f"layer {spec.path!r} has one number a row, {_shown(spec)}: it has no units", "layer")
    name = LayerName.parse(spec.path)
    dimension, units = _units(model, name, spec, edit, shape)
    tokens = len(shape) == 3 and dimension == 2
    masked = tokens and spec.shape[1] == -1 and request.tokens is not None
    _check_positions(spec, edit, shape, dimension, request.tokens if masked and request.tokens else ())
    _check_action(spec, edit.action, shape[dimension] if units is None else len(units))
    return Planned(
        name=LayerName(f"{name.path}.out", name.call, "") if edit.heads else name,
        before=bool(edit.heads),
        shape=shape,
        action=edit.action,
        unit_dimension=dimension,
        units=units,
        positions=edit.positions or None,
        masked=masked,
    )


def _layer(layers: Mapping[str, LayerSpec], path: str) -> LayerSpec:
    spec = layers.get(path)
    if spec is None:
        calls = [known for known in layers if known.startswith((f"{path}#", f"{path}["))]
        hint = f"; it has {', '.join(calls[:4])}: name one" if calls else nearest(path, layers)
        raise SteeringError(f"no layer {path!r}{hint}; an edit takes the name of one layer, not a pattern", "layer")
    if not spec.available:
        raise SteeringError(f"layer {path!r} can't be edited: {spec.reason}", "layer")
    if spec.datatype not in _LARGEST:
        raise SteeringError(f"layer {path!r} can't be edited: it holds {spec.datatype}, not floats", "layer")
    if path.endswith(WEIGHTS):
        raise SteeringError(f"layer {path!r} can't be edited: the module computes with other tensors", "layer")
    return spec


def _units(
    model: nn.Module, name: LayerName, spec: LayerSpec, edit: Edit, shape: tuple[int, ...]
) -> tuple[int, tuple[int, ...] | None]:
    """Return the dimension of the units, and those that are changed, None for all."""
    given = [field for field in ("units", "channels", "heads") if getattr(edit, field)]
    if len(given) > 1:
        raise SteeringError(f"{' and '.join(given)} are both given; an edit takes one of them", given[1])
    if edit.heads:
        return 2, _units_of_heads(_attention(model, name, spec), edit.heads, spec)
    if edit.units and len(shape) > 3:
        raise SteeringError(
            f"units are of [N, F] or [N, T, D]; layer {spec.path!r} is {_shown(spec)}, take channels", "units"
        )
    dimension = 1 if edit.channels or len(shape) > 3 else len(shape) - 1
    field, chosen = ("channels", edit.channels) if edit.channels else ("units", edit.units)
    _check_indices(field, chosen, shape[dimension], spec)
    return dimension, chosen or None


def _attention(model: nn.Module, name: LayerName, spec: LayerSpec) -> MultiHeadAttention:
    module = model.get_submodule(name.path)
    if isinstance(module, MultiHeadAttention):
        return module
    if isinstance(module, nn.MultiheadAttention):
        why = "torch's MultiheadAttention joins and projects its heads in one function, without a module between"
    else:
        why = (
            f"a {spec.type} is no MultiHeadAttention of layercast; where another module returns the heads' joined "
            "values, a head is a run of its units"
        )
    raise SteeringError(f"layer {spec.path!r} has no heads to edit: {why}", "heads")


def _units_of_heads(module: MultiHeadAttention, heads: tuple[int, ...], spec: LayerSpec) -> tuple[int, ...]:
    """Return the units of the joined heads, which the output projection takes, that belong to `heads`."""
    _check_indices("heads", heads, module.num_heads, spec)
    return tuple(head * module.head_dim + unit for head in heads for unit in range(module.head_dim))


def _check_indices(field: str, chosen: Sequence[int], size: int, spec: LayerSpec) -> None:
    seen = set()
    for at, index in enumerate(chosen):
        if not 0 <= index < size:
            raise SteeringError(
                f"layer {spec.path!r} has {size} {field}, 0 to {size - 1}, got {index}", f"{field}[{at}]"
            )
        if index in seen:
            raise SteeringError(f"{index} is given twice", f"{field}[{at}]")
        seen.add(index)


def _check_positions(
    spec: LayerSpec, edit: Edit, shape: tuple[int, ...], dimension: int, tokens: Sequence[int]
) -> None:
    if not edit.positions:
        return
    if len(shape) == 2:
        raise SteeringError(f"layer {spec.path!r} is {_shown(spec)} and has no positions", "positions")
    places = math.prod(size for at, size in enumerate(shape) if at not in (0, dimension))
    _check_indices("positions", edit.positions, places, spec)
    last = max(edit.positions)
    for row, count in enumerate(tokens):
        if last >= count:
            raise SteeringError(
                f"position {last} is asked for, but row {row} has {count} tokens that are not padding; "
                "send rows that have it in a request of their own",
                f"positions[{edit.positions.index(last)}]",
            )


def _check_action(spec: LayerSpec, action: Action, units: int) -> None:
    if isinstance(action, Scale):
        _check_number(spec, action.factor, "scale")
    elif isinstance(action, Add):
        if len(action.vector) != units:
            raise SteeringError(
                f"the vector has {len(action.vector)} numbers for the {units} units of layer {spec.path!r} "
                "that are changed",
                "add.values",
            )
        for at, number in enumerate(action.vector):
            _check_number(spec, number, f"add.values[{at}]")
    elif isinstance(action, Clamp):
        bounds = {"clamp.low": action.low, "clamp.high": action.high}
        for field, bound in bounds.items():
            if bound is not None:
                _check_number(spec, bound, field)
        if action.low is None and action.high is None:
            raise SteeringError("neither low nor high is given", "clamp")
        if action.low is not None and action.high is not None and action.low > action.high:
            raise SteeringError(f"low, {action.low:g}, is above high, {action.high:g}", "clamp")


def _check_number(spec: LayerSpec, number: float, field: str) -> None:
    if not math.isfinite(number) or abs(number) > _LARGEST[spec.datatype]:
        raise SteeringError(f"want a finite number that {spec.datatype} holds, got {number:g}", field)


def _shown(spec: LayerSpec) -> str:
    return f"of shape {list(spec.shape)}"
