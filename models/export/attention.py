"""Rewrites exported attention into ONNX Runtime's `Attention` operator, which computes it in one step.

ONNX Runtime's own optimisers do not find the attention of `layers/attention.py`: they know masks that are added, ours
is filled in. So it is found here, by onnxscript's pattern rewriter.
"""

from typing import Any, Final

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter import pattern, rewrite
from onnxscript.rewriter.pattern import MatchResult, RewriteRuleClassBase

DOMAIN: Final = "com.microsoft"
"""Where ONNX Runtime's own operators live; other runtimes do not know them."""

_PROJECTIONS: Final = ("q", "k", "v")
_INT32: Final = ir.DataType.INT32


class _PaddedSelfAttention(RewriteRuleClassBase):
    """`MultiHeadAttention(x, key_padding_mask=padding)` as torch exports it, up to the output projection."""

    def pattern(
        self, op: Any, x: Any, hidden: Any, scale: Any, lowest: Any, zero: Any,
        wq: Any, bq: Any, wk: Any, bk: Any, wv: Any, bv: Any,
    ) -> Any:  # fmt: skip
        """Return the pattern; other masks, other keys than the queries and a scale elsewhere do not match."""
        q = op.Transpose(self._project(op, x, wq, bq), perm=[0, 2, 1, 3], _outputs=["heads"])
        k = op.Transpose(self._project(op, x, wk, bk), perm=[0, 2, 3, 1])
        v = op.Transpose(self._project(op, x, wv, bv), perm=[0, 2, 1, 3])
        scores = op.Where(hidden, lowest, op.MatMul(op.Div(q, scale), k))
        weights = op.Where(hidden, zero, op.Softmax(scores, axis=-1))
        joined = op.Transpose(op.MatMul(weights, v), perm=[0, 2, 1, 3])
        return op.Reshape(joined, pattern.ANY_VALUE, _outputs=["attended"])

    def check(self, op: Any, *args: Any, **found: Any) -> MatchResult:
        """Accept what the operator computes: float32, known head count, constant weights, a mask over keys alone."""
        result = MatchResult()
        heads, hidden = found["heads"], found["hidden"]
        if heads.dtype != ir.DataType.FLOAT or _head_count(heads) is None:
            return result.fail("want float32 and a constant number of heads", heads)
        if _padding(hidden) is None:
            return result.fail("want a mask [N, 1, 1, S] that was [N, S]", hidden)
        constants = [found[f"{kind}{name}"] for name in _PROJECTIONS for kind in "wb"]
        if any(value.const_value is None for value in (*constants, found["scale"], found["lowest"], found["zero"])):
            return result.fail("want constant weights, scale and fill values")
        if _constant(found["lowest"]) != np.finfo(np.float32).min or _constant(found["zero"]) != 0:
            return result.fail("want hidden scores filled with the lowest number and their weights with zero")
        return result

    def rewrite(
        self, op: Any, x: ir.Value, hidden: ir.Value, scale: ir.Value, lowest: ir.Value, heads: ir.Value,
        attended: ir.Value, **found: ir.Value,
    ) -> Any:  # fmt: skip
        """Return the operator on the three projections side by side, with a mask of what counts."""
        weights, biases = (
            np.concatenate([_constant(found[f"{kind}{name}"]) for name in _PROJECTIONS], axis=-1) for kind in "wb"
        )
        counts = op.Not(_padding(hidden))
        joined = op.Attention(
            x,
            op.initializer(ir.tensor(weights), f"{attended.name}.weights"),
            op.initializer(ir.tensor(biases), f"{attended.name}.biases"),
            op.Cast(counts, to=_INT32),
            num_heads=_head_count(heads),
            scale=1 / float(_constant(scale)),
            mask_filter_value=float(_constant(lowest)),
            _domain=DOMAIN,
            _version=1,
        )
        # A row of padding alone attends to nothing, where the operator gives the mean of its values.
        tokens = op.Cast(op.Unsqueeze(counts, op.Constant(value_ints=[2])), to=ir.DataType.FLOAT)
        return op.Mul(joined, op.ReduceMax(tokens, op.Constant(value_ints=[1]), keepdims=1))

    @staticmethod
    def _project(op: Any, x: Any, weight: Any, bias: Any) -> Any:
        return op.Reshape(op.Add(op.MatMul(x, weight), bias), pattern.ANY_VALUE)


def _head_count(heads: ir.Value) -> int | None:
    """Return H of a value [N, H, T, D], None if it is not constant."""
    count = heads.shape[1] if heads.shape is not None and len(heads.shape) == 4 else None
    return count if isinstance(count, int) else None


def _constant(value: ir.Value) -> Any:
    if value.const_value is None:
        raise ValueError(f"{value.name} is no constant")
    return value.const_value.numpy()


def _padding(hidden: ir.Value) -> ir.Value | None:
    """Return the [N, S] mask that was unsqueezed to `hidden`, [N, 1, 1, S]; None for any other mask."""
    node, shape = hidden.producer(), hidden.shape
    if node is None or node.op_type != "Unsqueeze" or shape is None or len(shape) != 4 or list(shape)[1:3] != [1, 1]:
        return None
    padding = node.inputs[0]
    return padding if padding is not None and padding.shape is not None and len(padding.shape) == 2 else None


def fuse(model: ir.Model) -> tuple[ir.Model, int]:
    """Return `model` with every attention that matches rewritten, and how many there were; `model` is changed."""
    rule = _PaddedSelfAttention.rule()  # type: ignore[no-untyped-call]
    rewritten: ir.Model = rewrite(model, [rule])
    return rewritten, sum(node.op_type == "Attention" and node.domain == DOMAIN for node in rewritten.graph)
