"""Whether the time that an ONNX program takes follows from the shapes of its inputs. Needs `onnx`."""

import math
from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto

_LENGTH: Final = 16
"""Of the dimensions besides the rows whose size is open."""
_SIZES: Final = frozenset((
    "Add", "Cast", "Concat", "Constant", "Div", "Gather", "Identity", "Max", "Min", "Mul", "Neg", "Range", "Reshape",
    "Slice", "Squeeze", "Sub", "Unsqueeze",
))  # fmt: skip
"""Operators that compute sizes from sizes."""
_ATTENDED: Final = {"Attention": 4, "QAttention": 8}
"""The inputs of attention over one text: what is attended, weights, biases, a mask."""
_UNEVEN: Final = "qkv_hidden_sizes"
_MOST_SIZES: Final = 1024
"""Values that a list of sizes has at most."""


def steady(content: bytes) -> bool:
    """Tell whether what the program in `content` computes follows from the shapes of its inputs, not from their values.

    It has no branch and no loop, and the shape of every value inside can be inferred from those of the inputs, with
    one row of some length. What the program says of these shapes itself counts for nothing. False also where ONNX can't
    tell: of functions and operators that are not its own, but for attention as it is fused, and of bytes that are no
    program.
    """
    import onnx

    try:
        model = onnx.load_from_string(content)
        _forget_shapes(model)
        _unfuse(model)
        graph = _inferred(model).graph
    except Exception:  # protobuf's own and those of the inference share no class
        return False
    fixed = {value.name for value in (*graph.value_info, *graph.output) if _fixed(value)}
    branches = any(attribute.HasField("g") or attribute.graphs for node in graph.node for attribute in node.attribute)
    return (
        not model.functions
        and not branches
        and all(name in fixed for node in graph.node for name in node.output if name)
    )


def _forget_shapes(model: "ModelProto") -> None:
    """Let each input have one row of one length, and leave no other shape that anyone may have written."""
    graph = model.graph
    del graph.value_info[:]
    for output in graph.output:
        output.type.tensor_type.ClearField("shape")
    weights = {weight.name for weight in graph.initializer}
    for given in graph.input:
        dimensions = given.type.tensor_type.shape.dim
        if given.name not in weights and dimensions:
            dimensions[0].dim_value = 1
            for dimension in dimensions[1:]:
                if not dimension.HasField("dim_value"):
                    dimension.dim_value = _LENGTH


def _unfuse(model: "ModelProto") -> None:
    """Put a node of the same output's shape in the place of ONNX Runtime's attention, which ONNX does not know."""
    from onnx import TensorProto, helper

    weights = {weight.name: list(weight.dims) for weight in model.graph.initializer}
    for node in model.graph.node:
        if node.domain != "com.microsoft" or node.op_type not in _ATTENDED or len(node.output) != 1:
            continue
        hidden, every = weights[node.input[1]]
        few = len(node.input) <= _ATTENDED[node.op_type]
        # As many for queries, keys and values; and none of a text that came before, which other inputs would tell of.
        if every == 3 * hidden and few and not any(a.name == _UNEVEN for a in node.attribute):
            node.domain, node.op_type = "", "Cast"
            del node.input[1:], node.attribute[:]
            node.attribute.append(helper.make_attribute("to", TensorProto.FLOAT))


def _inferred(model: "ModelProto") -> "ModelProto":
    """Return `model` with the shapes of its values; sizes that are computed from shapes are constants in it.

    ONNX itself follows them through most operators, not through a range, by which a text's positions are counted.
    """
    from onnx import numpy_helper, shape_inference

    graph = model.graph
    known = {w.name: numpy_helper.to_array(w) for w in graph.initializer if _is_small(w)}
    while True:
        inferred = shape_inference.infer_shapes(model, data_prop=True)
        shapes = {
            value.name: np.array([size.dim_value for size in value.type.tensor_type.shape.dim], np.int64)
            for value in (*inferred.graph.input, *inferred.graph.value_info)
            if _fixed(value)
        }
        left, found = [], []
        for node in graph.node:
            sizes = _sizes(node, shapes, known)
            if sizes is None or sizes.size > _MOST_SIZES:
                left.append(node)
            else:
                known[node.output[0]] = sizes
                found.append(numpy_helper.from_array(sizes, node.output[0]))
        if not found:
            return inferred
        del graph.node[:]
        graph.node.extend(left)
        graph.initializer.extend(found)


def _sizes(
    node: "NodeProto", shapes: "dict[str, NDArray[np.int64]]", known: "dict[str, NDArray[Any]]"
) -> "NDArray[Any] | None":
    """Return what `node` makes of a fixed shape, or of sizes that are known; None where it is neither."""
    from onnx.reference import ReferenceEvaluator

    if node.domain or len(node.output) != 1:
        return None
    if node.op_type == "Shape" and node.input[0] in shapes:
        known = {node.input[0]: np.broadcast_to(np.float32(0), shapes[node.input[0]])}
    elif node.op_type not in _SIZES or not all(name in known for name in node.input if name):
        return None
    (made,) = ReferenceEvaluator(node).run(None, {name: known[name] for name in node.input if name})
    return np.asarray(made)


def _is_small(weight: "TensorProto") -> bool:
    return math.prod(weight.dims) <= _MOST_SIZES and not weight.external_data


def _fixed(value: "ValueInfoProto") -> bool:
    shape = value.type.tensor_type.shape
    return value.type.tensor_type.HasField("shape") and all(size.HasField("dim_value") for size in shape.dim)
