"""ONNX Runtime's `Attention` operator, as the rules that rewrite exported self-attention put it in."""

from typing import Any, Final

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter.pattern import RewriteRuleClassBase

DOMAIN: Final = "com.microsoft"
"""Where ONNX Runtime's own operators live; other runtimes do not know them."""


class SelfAttention(RewriteRuleClassBase):
    """What all rules share."""

    @staticmethod
    def operator(op: Any, x: Any, weights: Any, biases: Any, attended: Any, *mask: Any, **attributes: Any) -> Any:
        """Return the operator on the projections of `x` side by side, queries first; `attended` is what it replaces."""
        return op.Attention(
            x,
            op.initializer(ir.tensor(np.concatenate(weights, axis=-1)), f"{attended.name}.weights"),
            op.initializer(ir.tensor(np.concatenate(biases, axis=-1)), f"{attended.name}.biases"),
            *mask,
            **attributes,
            _domain=DOMAIN,
            _version=1,
        )

    @staticmethod
    def mask(op: Any, counts: Any) -> Any:
        """Return the mask for the operator, of the tokens that count, a boolean [N, S]."""
        return op.Cast(counts, to=ir.DataType.INT32)

    @staticmethod
    def any_counts(op: Any, counts: Any) -> Any:
        """Return 1 for rows with a token that counts, 0 for those of padding alone, [N, 1, 1]."""
        tokens = op.Cast(op.Unsqueeze(counts, op.Constant(value_ints=[2])), to=ir.DataType.FLOAT)
        return op.ReduceMax(tokens, op.Constant(value_ints=[1]), keepdims=1)


def constant(value: ir.Value) -> Any:
    """Return the numbers of a constant."""
    if value.const_value is None:
        raise ValueError(f"{value.name} is no constant")
    return value.const_value.numpy()
