"""Rewrites exported self-attention into ONNX Runtime's `Attention` operator, which computes it in one step.

ONNX Runtime's own optimisers do not find the attention of `layers/attention.py`: the query is scaled before the
product, and they know masks that are added, ours is filled in. So it is found here, by onnxscript's pattern rewriter.
"""

from typing import Any, Final

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import CommonSubexpressionEliminationPass, DeduplicateHashedInitializersPass
from onnxscript.rewriter import pattern, rewrite
from onnxscript.rewriter.pattern import MatchResult

from layercast.models.export import scaled_attention
from layercast.models.export.attention_operator import DOMAIN, SelfAttention, constant

_PROJECTIONS: Final = ("q", "k", "v")


class _Ours(SelfAttention):
    """What both rules share: three projections of one `x`, split into heads, and the heads joined again."""

    def check(self, op: Any, *args: Any, **found: Any) -> MatchResult:
        """Accept what the operator computes: float32, as many and as large heads of all three, constant weights."""
        result = MatchResult()
        constants = [found[f"{kind}{name}"] for name in _PROJECTIONS for kind in "wb"]
        if any(value.const_value is None for value in (*constants, found["scale"])):
            return result.fail("want constant weights and scale")
        if constant(found["scale"]).size != 1 or not constant(found["scale"]).all():
            return result.fail("want one scale for all heads", found["scale"])
        if found["heads"].dtype != ir.DataType.FLOAT or not _even(found):
            return result.fail("want float32, and the same constant number and size of heads everywhere")
        return result

    @staticmethod
    def heads(op: Any, x: Any, q: tuple[Any, Any], k: tuple[Any, Any], v: tuple[Any, Any]) -> tuple[Any, Any, Any]:
        """Return the patterns of queries, keys and values by heads; each is projected by a weight and a bias."""
        queries, keys, values = (
            op.Reshape(op.Add(op.MatMul(x, weight), bias), pattern.ANY_VALUE) for weight, bias in (q, k, v)
        )
        return (
            op.Transpose(queries, perm=[0, 2, 1, 3], _outputs=["heads"]),
            op.Transpose(keys, perm=[0, 2, 3, 1], _outputs=["keys"]),
            op.Transpose(values, perm=[0, 2, 1, 3], _outputs=["values"]),
        )

    @staticmethod
    def attended(op: Any, weights: Any, values: Any) -> Any:
        """Return the pattern of what the heads attend to, joined."""
        joined = op.Transpose(op.MatMul(weights, values), perm=[0, 2, 1, 3])
        return op.Reshape(joined, pattern.ANY_VALUE, _outputs=["attended"])

    def fused(self, op: Any, found: dict[str, Any], *mask: Any, **attributes: Any) -> Any:
        """Return the operator in place of what was `found`."""
        weights, biases = ([constant(found[f"{kind}{name}"]) for name in _PROJECTIONS] for kind in "wb")
        heads, scale = found["heads"].shape[1], 1 / float(constant(found["scale"]))
        return self.operator(
            op, found["x"], weights, biases, found["attended"], *mask, num_heads=heads, scale=scale, **attributes
        )


class _Unmasked(_Ours):
    """`MultiHeadAttention(x)` as torch exports it, up to the output projection."""

    def pattern(self, op: Any, x: Any, scale: Any, wq: Any, bq: Any, wk: Any, bk: Any, wv: Any, bv: Any) -> Any:
        """Return the pattern; any mask, other keys than the queries and a scale elsewhere do not match."""
        q, k, v = self.heads(op, x, (wq, bq), (wk, bk), (wv, bv))
        return self.attended(op, op.Softmax(op.MatMul(op.Div(q, scale), k), axis=-1), v)

    def rewrite(self, op: Any, **found: Any) -> Any:
        """Return the operator alone."""
        return self.fused(op, found)


class _Padded(_Ours):
    """`MultiHeadAttention(x, key_padding_mask=padding)`, likewise."""

    def pattern(
        self, op: Any, x: Any, hidden: Any, scale: Any, lowest: Any, zero: Any,
        wq: Any, bq: Any, wk: Any, bk: Any, wv: Any, bv: Any,
    ) -> Any:  # fmt: skip
        """Return the pattern; `check` tells a mask over keys alone from others, which match too."""
        q, k, v = self.heads(op, x, (wq, bq), (wk, bk), (wv, bv))
        scores = op.Where(hidden, lowest, op.MatMul(op.Div(q, scale), k))
        return self.attended(op, op.Where(hidden, zero, op.Softmax(scores, axis=-1)), v)

    def check(self, op: Any, *args: Any, **found: Any) -> MatchResult:
        """Accept a mask over keys alone that is filled in as ours is."""
        result = super().check(op, *args, **found)
        if not result:
            return result
        if _padding(found["hidden"]) is None:
            return result.fail("want a mask [N, 1, 1, S] that was [N, S]", found["hidden"])
        lowest, zero = found["lowest"], found["zero"]
        if lowest.const_value is None or zero.const_value is None:
            return result.fail("want constant fill values")
        if constant(lowest) != np.finfo(np.float32).min or constant(zero) != 0:
            return result.fail("want hidden scores filled with the lowest number and their weights with zero")
        return result

    def rewrite(self, op: Any, **found: Any) -> Any:
        """Return the operator with a mask of what counts."""
        counts = op.Not(_padding(found["hidden"]))
        lowest = float(constant(found["lowest"]))
        joined = self.fused(op, found, self.mask(op, counts), mask_filter_value=lowest)
        # A row of padding alone attends to nothing, where the operator gives the mean of its values.
        return op.Mul(joined, self.any_counts(op, counts))


def _even(found: dict[str, Any]) -> bool:
    """Tell whether x [N, T, E] is projected to H heads of one size, for queries, keys and values, and joined again.

    To E values together: of others `onnx_shapes` could not tell what comes out.
    """
    x, heads = found["x"].shape, found["heads"].shape
    if x is None or len(x) != 3 or heads is None or len(heads) != 4:
        return False
    count, size = heads[1], heads[3]
    if not isinstance(count, int) or not isinstance(size, int):
        return False
    rows, length, width = x[0], x[1], count * size
    return (
        x[2] == width
        and heads == [rows, count, length, size]
        and found["keys"].shape == [rows, count, size, length]
        and found["values"].shape == heads
        and found["attended"].shape == [rows, length, width]
        and all(constant(found[f"w{name}"]).shape == (x[2], width) for name in _PROJECTIONS)
        and all(constant(found[f"b{name}"]).shape == (width,) for name in _PROJECTIONS)
    )


def _padding(hidden: ir.Value) -> ir.Value | None:
    """Return the [N, S] mask that was unsqueezed to `hidden`, [N, 1, 1, S]; None for any other mask."""
    node, shape = hidden.producer(), hidden.shape
    if node is None or node.op_type != "Unsqueeze" or shape is None or len(shape) != 4 or list(shape)[1:3] != [1, 1]:
        return None
    padding = node.inputs[0]
    return padding if padding is not None and padding.shape is not None and len(padding.shape) == 2 else None


def fuse(model: ir.Model) -> tuple[ir.Model, int]:
    """Return `model` with every attention that matches rewritten, and how many there were; `model` is changed."""
    rules = [_Unmasked.rule(), _Padded.rule(), *scaled_attention.rules()]  # type: ignore[no-untyped-call]
    rewritten: ir.Model = rewrite(model, rules)
    CommonSubexpressionEliminationPass()(rewritten)  # each attention has made its own mask,
    DeduplicateHashedInitializersPass()(rewritten)  # and joined its own weights, which may be those of another
    return rewritten, sum(node.op_type == "Attention" and node.domain == DOMAIN for node in rewritten.graph)
