"""Where the heads and the mask of an exported attention come from: projections of one value, and a mask of keys."""

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import onnx_ir as ir

from layercast.models.export.attention_operator import constant

_BY_HEADS: Final = (("Reshape", None), ("Transpose", [1, 0, 2]))
"""How heads [N, H, T, D] come from heads [T, N · H, D], backwards."""
_SEQUENCE_FIRST: Final = (
    ("Reshape", None), ("Gather", None), ("Squeeze", None), ("Transpose", [3, 1, 2, 0, 4]), ("Unsqueeze", None),
    ("Reshape", None),
)  # fmt: skip
"""How `nn.MultiheadAttention` gets heads [T, N · H, D] from a product [T, N, 3 · E], backwards."""
_THIRDS: Final = (("Squeeze", None), ("Slice", None), ("Transpose", [2, 0, 3, 1, 4]), ("Reshape", None))
"""How heads [N, H, T, D] come from a product [N, T, 3 · H · D] that was split into [N, T, 3, H, D], backwards."""
_SHAPING: Final = frozenset(("Reshape", "Expand", "Unsqueeze"))


class Projected(NamedTuple):
    """`x` [N, T, E] · `weights` [E, E] + `biases` [E]."""

    x: ir.Value
    weights: Any
    biases: Any


class Keys(NamedTuple):
    """Keys count where `mask`, [N, T] or [N, 1, 1, T], is `kept`; `hidden` is added to the scores of others."""

    mask: ir.Value
    kept: bool
    hidden: float


def projected(heads: ir.Value, at: int) -> Projected | None:
    """Return what `heads`, [N, H, T, D] or [T, N · H, D], were projected by, and from.

    `at` tells queries, keys and values of one product. From E numbers to E numbers: of others `onnx_shapes` could not
    tell what comes out.
    """
    shape = heads.shape
    if shape is None or not isinstance(shape[-1], int):
        return None
    found = _sequence_first(heads, at, shape[-1]) if len(shape) == 3 else _batch_first(heads, at)
    if found is None or found.x.shape is None or len(found.x.shape) != 3:
        return None
    rows, length, wide = found.x.shape
    if not isinstance(wide, int) or found.weights.shape != (wide, wide) or wide % shape[-1]:
        return None
    return found if len(shape) == 3 or shape == [rows, wide // shape[-1], length, shape[-1]] else None


def keys_of(mask: ir.Value, heads: Sequence[Any]) -> Keys | None:
    """Return the boolean mask of keys that `mask`, which is added to the scores of `heads`, was made from."""
    rows, _, length, _ = heads
    value: ir.Value | None = mask
    while value is not None and value.shape is not None and value.shape[-1] == length:
        node = value.producer()
        if node is None or node.domain:
            return None
        if node.op_type == "Where":
            return _filled(node, [[rows, length], [rows, 1, 1, length]])
        source = node.inputs[0]
        if source is None or source.shape is None or not _keeps_rows(node.op_type, value.shape, source.shape, heads):
            return None
        value = source
    return None


def _keeps_rows(operator: str, shape: ir.Shape, source: ir.Shape, heads: Sequence[Any]) -> bool:
    """Tell whether an operator that makes a mask of `shape` from `source` leaves every row's mask with its row.

    Not so one that is expanded by heads first: head h of row n would have the mask of another row.
    """
    rows, count, length, _ = heads
    by_rows = ([rows, 1, 1, length], [rows, count, 1, length])
    if operator not in _SHAPING:
        return False
    if shape in by_rows:
        return operator != "Expand" or source in by_rows
    if len(shape) != 3:
        return False
    if shape == [rows, 1, length]:
        return operator != "Expand"
    return source in by_rows if operator == "Reshape" else operator == "Expand" and len(source) == 3


def number(value: ir.Value) -> float | None:
    """Return the one number that a constant, or what it is expanded to, holds."""
    node = value.producer()
    if node is not None and node.op_type == "Expand" and node.inputs[0] is not None:
        value = node.inputs[0]
    return float(constant(value).item()) if value.const_value is not None and value.const_value.size == 1 else None


def _filled(node: ir.Node, shapes: Sequence[Sequence[Any]]) -> Keys | None:
    """Return the mask of `Where(mask, 0, hidden)`, or with both the other way round."""
    mask, yes, no = node.inputs
    shape = node.outputs[0].shape
    if mask is None or yes is None or no is None or shape is None or list(shape) not in shapes or mask.shape != shape:
        return None
    pair = number(yes), number(no)
    if None in pair or pair.count(0) != 1:
        return None
    kept = pair[0] == 0
    hidden = pair[1] if kept else pair[0]
    return Keys(mask, kept, hidden) if hidden is not None and hidden < 0 else None


def _batch_first(heads: ir.Value, at: int) -> Projected | None:
    """Return what `heads` [N, H, T, D] were projected by: alone, side by side, or by `nn.MultiheadAttention`."""
    if heads.shape is None or len(heads.shape) != 4:
        return None
    rows, count, length, size = heads.shape
    alone = _back(heads, (("Transpose", [0, 2, 1, 3]), ("Reshape", None)))
    if alone is not None and alone[0].shape == [rows, length, count, size]:
        split = alone[1].producer()
        if split is None or split.op_type != "Split":
            return _linear(alone[1])
        equal = len(split.outputs) == 3 and all(part.shape == alone[1].shape for part in split.outputs)
        last = split.attributes["axis"].as_int() in (-1, 2) if "axis" in split.attributes else False
        fits = equal and last and split.outputs[at] is alone[1] and split.inputs[0] is not None
        return _third(_linear(split.inputs[0]), at) if fits and split.inputs[0] is not None else None
    thirds = _back(heads, _THIRDS)
    if thirds is not None and thirds[2].shape == [rows, length, 3, count, size]:
        node = thirds[0].producer()
        start = node.inputs[1] if node is not None else None
        return _third(_linear(thirds[3]), at) if start is not None and number(start) == at else None
    first = _back(heads, _BY_HEADS)
    return _sequence_first(first[1], at, size) if first is not None else None


def _sequence_first(heads: ir.Value, at: int, size: Any) -> Projected | None:
    """Return what `nn.MultiheadAttention` projects `heads` [T, N · H, D] by."""
    steps = _back(heads, _SEQUENCE_FIRST)
    gather = steps[0].producer() if steps is not None else None
    index = gather.inputs[1] if gather is not None else None
    linear = _linear(steps[-1]) if steps is not None else None
    first = _back(linear.x, (("Transpose", [1, 0, 2]),)) if linear is not None else None
    if steps is None or linear is None or first is None or first[0].shape is None or len(first[0].shape) != 3:
        return None
    rows, length, wide = first[0].shape
    if index is None or number(index) != at or steps[4].shape != [length, rows, 3, wide]:
        return None
    whole = heads.shape is not None and len(heads.shape) == 3 and heads.shape[0] == length and heads.shape[2] == size
    return _third(linear._replace(x=first[0]), at) if whole else None


def _third(linear: Projected | None, at: int) -> Projected | None:
    """Return the `at`th third of what `linear` gives."""
    if linear is None or linear.weights.shape[1] % 3:
        return None
    wide = linear.weights.shape[1] // 3
    part = slice(at * wide, (at + 1) * wide)
    return Projected(linear.x, linear.weights[:, part], linear.biases[part])


def _linear(value: ir.Value) -> Projected | None:
    """Return the linear layer that gives `value`; without a bias, zeros are added."""
    node, bias = value.producer(), None
    if node is not None and node.op_type == "Add":
        product, added = node.inputs
        if product is None or added is None or added.const_value is None:
            return None
        node, bias = product.producer(), constant(added)
    if node is None or node.op_type != "MatMul" or node.inputs[0] is None or node.inputs[1] is None:
        return None
    if node.inputs[1].const_value is None:
        return None
    weights = constant(node.inputs[1])
    if weights.ndim != 2 or (bias is not None and bias.shape != weights.shape[1:]):
        return None
    return Projected(node.inputs[0], weights, np.zeros_like(weights[0]) if bias is None else bias)


def _back(value: ir.Value, steps: Sequence[tuple[str, list[int] | None]]) -> list[ir.Value] | None:
    """Return what went into each of the `steps`, the last of which gives `value`; None where others were taken."""
    found: list[ir.Value] = []
    for operator, permutation in steps:
        node = value.producer()
        if node is None or (node.domain, node.op_type) != ("", operator) or node.inputs[0] is None:
            return None
        if permutation is not None and (
            "perm" not in node.attributes or list(node.attributes["perm"].as_ints()) != permutation
        ):
            return None
        value = node.inputs[0]
        found.append(value)
    return found
