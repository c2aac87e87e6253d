"""Which ONNX programs take as long for any values: those without branches, loops and shapes that come from values."""

from collections.abc import Sequence

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from layercast.models.onnx_shapes import steady

WEIGHTS = {
    "w": np.ones((4, 3), "f4"), "first": np.array([0]), "two": np.array([2, 2]), "one": np.array([1]),
    "qkv": np.ones((4, 12), "f4"), "qkv8": np.ones((4, 12), "i1"), "zero8": np.array(0, "i1"), "uneven": np.ones((4, 16), "f4"), "bias": np.zeros(12, "f4"),
    "none": np.array(0), "step": np.array(1), "zero": np.array(0), "scalar": np.array(1.0, "f4"), "many": np.array(9), "true": np.array(True),
}  # fmt: skip


def node(kind: str, given: str, made: str, **attributes: object) -> onnx.NodeProto:
    return helper.make_node(kind, given.split(), made.split(), **attributes)


def value(name: str, shape: Sequence[object] | None = None, kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def program(nodes: Sequence[onnx.NodeProto], functions: Sequence[onnx.FunctionProto] = ()) -> bytes:
    """Return a program of [N, 4] that says each value inside is [2, 2]."""
    said = [value(name, [2, 2]) for made in nodes for name in made.output if name != "y"]
    weights = [numpy_helper.from_array(array, name) for name, array in WEIGHTS.items()]
    graph = helper.make_graph(nodes, "g", [value("x", ["N", 4])], [value("y", [2, 2])], weights, value_info=said)
    opsets = [helper.make_opsetid(domain, version) for domain, version in (("", 20), ("own", 1), ("com.microsoft", 1))]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=functions)
    return bytes(model.SerializeToString())


def branch(name: str) -> onnx.GraphProto:
    return helper.make_graph([node("Relu", "x", name)], name, [], [value(name, ["N", 4])])


def body() -> onnx.GraphProto:
    nodes = [node("Identity", "go_on", "still"), node("Relu", "carried", "next")]
    given = [value("at", [], TensorProto.INT64), value("go_on", [], TensorProto.BOOL), value("carried", [1, 4])]
    return helper.make_graph(nodes, "body", given, [value("still", [], TensorProto.BOOL), value("next", [1, 4])])


STEADY = {
    "a layer": [node("MatMul", "x w", "h"), node("Relu", "h", "y")],
    "a shape that comes from a shape": [
        node("Shape", "x", "s"), node("Gather", "s first", "n"), node("Concat", "n two", "to", axis=0),
        node("Reshape", "x to", "y"),
    ],
    "an output that is not wanted": [node("Dropout", "x", "y ")],
    "a range that is counted from a shape": [
        node("Shape", "x", "s"), node("Gather", "s zero", "n"), node("Range", "none n step", "r"),
        node("Cast", "r", "f", to=TensorProto.FLOAT), node("Unsqueeze", "f one", "column"), node("Add", "x column", "y"),
    ],
    "attention as it is fused": [
        helper.make_node("Attention", ["x", "qkv", "bias"], ["a"], domain="com.microsoft", num_heads=2),
        node("Relu", "a", "y"),
    ],
    "attention as it is quantized": [
        node("DynamicQuantizeLinear", "x", "q s z"),
        helper.make_node(
            "QAttention", ["q", "qkv8", "bias", "s", "scalar", "", "z", "zero8"], ["a"], domain="com.microsoft", num_heads=2
        ),
        node("Relu", "a", "y"),
    ],
}  # fmt: skip
COUNTED = [node("ReduceMax", "x", "m", keepdims=0), node("Cast", "m", "c", to=TensorProto.INT64)]
UNSTEADY = {
    "indices of what is not zero": [node("NonZero", "x", "i"), node("Cast", "i", "y", to=TensorProto.FLOAT)],
    "distinct values": [node("Unique", "x", "u"), node("ReduceSum", "u", "y", keepdims=0)],
    "a size that is a value": [
        *COUNTED, node("Reshape", "c one", "s"), node("Expand", "scalar s", "e"), node("ReduceSum", "e", "y"),
    ],
    "a range that is a value": [*COUNTED, node("Range", "zero c many", "r"), node("ReduceSum", "r", "y")],
    "a branch": [node("If", "true", "y", then_branch=branch("a"), else_branch=branch("b"))],
    "a loop": [node("Loop", "many true x", "y", body=body())],
    "a shape that a range of values has": [
        *COUNTED, node("Range", "zero c step", "r"), node("Shape", "r", "s"), node("ConstantOfShape", "s", "y"),
    ],
    "attention with other sizes": [
        helper.make_node("Attention", ["x", "uneven", "bias"], ["y"], domain="com.microsoft", num_heads=2)
    ],
    "an operator that is not ONNX's": [helper.make_node("FusedGelu", ["x"], ["y"], domain="com.microsoft")],
}  # fmt: skip


@pytest.mark.parametrize("nodes", STEADY.values(), ids=STEADY)
def test_values_do_not_matter(nodes):
    assert steady(program(nodes))


@pytest.mark.parametrize("nodes", UNSTEADY.values(), ids=UNSTEADY)
def test_values_matter_or_may(nodes):
    assert not steady(program(nodes))


def test_the_zoos_models_are_steady(repository):
    for name in ("transformer", "shared"):
        assert steady((repository / name / "1" / "model.onnx").read_bytes()), name


def test_a_function_may_hide_what_matters():
    inside = [node("NonZero", "a", "i"), node("Cast", "i", "f", to=TensorProto.FLOAT), node("ReduceSum", "f", "b")]
    function = helper.make_function("own", "Count", ["a"], ["b"], inside, [helper.make_opsetid("", 20)])
    assert not steady(program([helper.make_node("Count", ["x"], ["y"], domain="own")], [function]))


def test_what_is_no_program_is_not_steady():
    assert not steady(b"no program")
