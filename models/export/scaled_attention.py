"""Rewrites self-attention by torch's `scaled_dot_product_attention` into ONNX Runtime's `Attention` operator.

Blocks that project queries, keys and values by layers of their own, and `nn.MultiheadAttention`, which projects all
three at once with the sequence first, also inside `nn.TransformerEncoderLayer`. Without a mask, or with one of keys.
"""

import math
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter import pattern
from onnxscript.rewriter.pattern import MatchResult, RewriteRuleClassBase

from layercast.models.export.attention_operator import DOMAIN, SelfAttention, constant
from layercast.models.export.attention_origins import Keys, Projected, keys_of, number, projected

_BATCH_FIRST: Final = [0, 2, 1, 3]
_SEQUENCE_FIRST: Final = [2, 0, 1, 3]
"""How heads [N, H, T, D] are turned before they are joined."""
_BATCHED: Final = [1, 0, 2]
"""How heads [N · H, T, D] are."""
_HEADS: Final = ("queries", "keys", "values")
_LOWEST: Final = float(np.finfo(np.float32).min)


class _Scaled(SelfAttention):
    """Attention as torch translates it: queries and keys are multiplied by the root of the scale, a mask is added."""

    def __init__(self, masked: bool, zeroed: bool) -> None:
        """Match attention that is `masked`, and, if `zeroed`, has zeros for rows that attend to nothing, else NaN."""
        super().__init__()
        self._masked = masked
        self._zeroed = zeroed

    def pattern(self, op: Any, queries: Any, keys: Any, values: Any, some: Any, other: Any, mask: Any, no: Any) -> Any:
        """Return the pattern from the heads on; `check` looks at what lies before."""
        turned = op.Transpose(op.Reshape(keys, pattern.ANY_VALUE), perm=[0, 2, 1])
        scores = op.MatMul(op.Mul(queries, some), op.Mul(op.Reshape(turned, pattern.ANY_VALUE), other))
        return self._attended(op, scores, values, mask, no)

    def _attended(self, op: Any, scores: Any, values: Any, mask: Any, no: Any) -> Any:
        weights = op.Softmax(op.Add(scores, mask) if self._masked else scores, axis=-1)
        if self._zeroed:
            weights = op.Where(op.IsNaN(weights), no, weights)
        turned = op.Transpose(op.MatMul(weights, values), _outputs=["turned"])
        return op.Reshape(turned, pattern.ANY_VALUE, _outputs=["attended"])

    def check(self, op: Any, *args: Any, **found: Any) -> MatchResult:
        """Accept what the operator computes: float32, constant weights, heads of one size that are E wide together."""
        result, parts = MatchResult(), _parts(found)
        if not parts:
            return result.fail("want three constant projections of one value")
        shapes = [list(found[name].shape) for name in _HEADS]
        if found["queries"].dtype != ir.DataType.FLOAT or shapes[1] != shapes[0] or shapes[2] != shapes[0]:
            return result.fail("want float32, and heads of one size everywhere")
        heads = _heads(found, parts[0])
        if not _scale(found):
            return result.fail("want one scale for all heads")
        if self._zeroed and number(found["no"]) != 0:
            return result.fail("want zeros for rows that attend to nothing", found["no"])
        if not _joined(found["turned"], found["attended"], heads):
            return result.fail("want heads joined again", found["attended"])
        if self._masked and keys_of(found["mask"], heads) is None:
            return result.fail("want a mask of keys alone that was boolean", found["mask"])
        return result

    def rewrite(self, op: Any, **found: Any) -> Any:
        """Return the operator, with the sequence first where torch has it so."""
        parts = _parts(found)
        x, heads = parts[0].x, _heads(found, parts[0])
        keys = keys_of(found["mask"], heads) if self._masked else None
        counts = () if keys is None else (self._counts(op, keys),)
        hidden = {} if keys is None else {"mask_filter_value": max(keys.hidden, _LOWEST)}
        attended = self.operator(
            op, x, [part.weights for part in parts], [part.biases for part in parts], found["attended"],
            *(self.mask(op, each) for each in counts), num_heads=heads[1], scale=_scale(found), **hidden,
        )  # fmt: skip
        if keys is not None and keys.hidden < _LOWEST:
            attended = op.Mul(attended, self._factor(op, *counts))
        if _permutation(found["turned"]) == _BATCH_FIRST:
            return attended
        attended.shape, attended.dtype = x.shape, x.dtype
        first = op.Transpose(attended, perm=[1, 0, 2])
        return op.Reshape(first, op.Constant(value_ints=[-1, int(heads[1]) * int(heads[3])]))

    @staticmethod
    def _counts(op: Any, keys: Keys) -> Any:
        mask = keys.mask if keys.kept else op.Not(keys.mask)
        return mask if len(keys.mask.shape or ()) == 2 else op.Squeeze(mask, op.Constant(value_ints=[1, 2]))

    def _factor(self, op: Any, counts: Any) -> Any:
        """Return what gives rows of padding alone zeros or NaN, as torch does; the operator gives a mean of values."""
        some = self.any_counts(op, counts)
        return some if self._zeroed else op.Div(some, some)


class _Batched(_Scaled):
    """`nn.MultiheadAttention` that could give its weights: by heads [N · H, T, D], and the queries alone are scaled."""

    def pattern(self, op: Any, queries: Any, keys: Any, values: Any, some: Any, mask: Any, no: Any) -> Any:  # type: ignore[override]
        """Return the pattern from the heads on, which still have the sequence first."""
        scaled = op.Mul(op.Transpose(queries, perm=[1, 0, 2]), some)
        scores = op.MatMul(scaled, op.Transpose(keys, perm=[1, 2, 0]))
        return self._attended(op, scores, op.Transpose(values, perm=[1, 0, 2]), mask, no)


class _Projection(RewriteRuleClassBase):
    """The output projection of `nn.MultiheadAttention`, which is done with the sequence first."""

    def __init__(self, biased: bool) -> None:
        """Match one that is `biased`."""
        super().__init__()
        self._biased = biased

    def pattern(self, op: Any, x: Any, weights: Any, bias: Any) -> Any:
        """Return the pattern."""
        flat = op.Reshape(op.Transpose(x, perm=[1, 0, 2]), pattern.ANY_VALUE)
        both = (weights, bias) if self._biased else (weights,)
        made = op.Reshape(op.Gemm(flat, *both, transB=1, _outputs=["made"]), pattern.ANY_VALUE)
        return op.Transpose(made, perm=[1, 0, 2], _outputs=["output"])

    def check(self, op: Any, *args: Any, **found: Any) -> MatchResult:
        """Accept constant weights and what was fused before."""
        result, x, output = MatchResult(), found["x"], found["output"].shape
        gemm = found["made"].producer().attributes
        if any(
            name in gemm and gemm[name].value != plain for name, plain in (("alpha", 1), ("beta", 1), ("transA", 0))
        ):
            return result.fail("want a plain product")
        if x.shape is None or output is None or len(output) != 3 or not _is_fused(x):
            return result.fail("want fused attention")
        if found["weights"].const_value is None or (self._biased and found["bias"].const_value is None):
            return result.fail("want constant weights")
        wide = constant(found["weights"]).shape[0]
        if list(output) != [*x.shape[:2], wide] or (self._biased and constant(found["bias"]).shape != (wide,)):
            return result.fail("want the same rows and tokens", found["output"])
        return result

    def rewrite(self, op: Any, **found: Any) -> Any:
        """Return the projection with the batch first."""
        name, weights = found["output"].name, constant(found["weights"])
        made = op.MatMul(found["x"], op.initializer(ir.tensor(np.ascontiguousarray(weights.T)), f"{name}.weights"))
        return op.Add(made, found["bias"]) if self._biased else made


def rules() -> list[Any]:
    """Return the rules in the order in which they apply to a block."""
    kinds = ((False, False), (True, False), (True, True))
    batched = [_Batched.rule(masked, False) for masked in (False, True)]  # type: ignore[no-untyped-call]
    return [*(_Scaled.rule(*kind) for kind in kinds), *batched, *(_Projection.rule(biased) for biased in (False, True))]  # type: ignore[no-untyped-call]


def _parts(found: dict[str, Any]) -> list[Projected]:
    """Return the projections of queries, keys and values, if they are all of one value."""
    parts = [part for at, name in enumerate(_HEADS) if (part := projected(found[name], at))]
    return parts if len(parts) == len(_HEADS) and all(part.x is parts[0].x for part in parts) else []


def _heads(found: dict[str, Any], part: Projected) -> list[Any]:
    """Return the shape of the queries by heads, [N, H, T, D]."""
    rows, length, wide = part.x.shape  # type: ignore[misc]
    size = found["queries"].shape[-1]
    return [rows, wide // size, length, size]


def _scale(found: dict[str, Any]) -> float | None:
    factors = [number(found[name]) for name in ("some", "other") if found.get(name) is not None]
    return None if None in factors else math.prod(factors)  # type: ignore[arg-type]


def _permutation(value: ir.Value) -> Sequence[int]:
    node = value.producer()
    return list(node.attributes["perm"].as_ints()) if node is not None and "perm" in node.attributes else []


def _joined(turned: ir.Value, attended: ir.Value, heads: Sequence[Any]) -> bool:
    """Tell whether `heads` [N, H, T, D] were joined to [N, T, E], or to [T · N, E]."""
    shape, wide = attended.shape, int(heads[1]) * int(heads[3])
    if shape is None or shape[-1] != wide:
        return False
    if _permutation(turned) == _BATCH_FIRST:
        return list(shape) == [heads[0], heads[2], wide]
    return _permutation(turned) in (_SEQUENCE_FIRST, _BATCHED) and len(shape) == 2


def _is_fused(x: ir.Value) -> bool:
    """Tell whether `x` is what the operator gives, or that times a factor."""
    node = x.producer()
    if node is not None and node.op_type == "Mul" and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    return node is not None and (node.domain, node.op_type) == (DOMAIN, "Attention")
