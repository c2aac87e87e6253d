"""Parts of ONNX programs: where they end, what they keep, and what can't be cut."""

from functools import partial

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from layercast.models.manifest import Manifest
from layercast.models.onnx_cut import CutError, cut, values_of
from layercast.models.onnx_runtime import onnxruntime


def test_a_part_ends_after_its_deepest_layer(repository):
    directory = repository / "resnet" / "1"
    content = (directory / "model.onnx").read_bytes()
    values = Manifest.read(directory).onnx_values
    first, last = (cut(content, [values[path]]) for path in ("layer1", "layer2"))
    assert len(first) < len(last) / 3
    nodes = onnx.load_from_string(first).graph.node
    assert nodes[-1].output[0] == values["layer1"]


def test_what_a_branch_reads_from_outside_is_kept():
    float_value = partial(helper.make_tensor_value_info, elem_type=TensorProto.FLOAT)
    branches = {
        name: helper.make_graph(
            [helper.make_node("Add" if name == "then_branch" else "Sub", ["x", "doubled"], [name])],
            name, [], [float_value(name, shape=[2])],
        )
        for name in ("then_branch", "else_branch")
    }  # fmt: skip
    nodes = [
        helper.make_node("Add", ["x", "x"], ["doubled"]),
        helper.make_node("ReduceMax", ["x"], ["largest"], keepdims=0),
        helper.make_node("Greater", ["largest", "zero"], ["positive"]),
        helper.make_node("If", ["positive"], ["chosen"], **branches),
        helper.make_node("Neg", ["chosen"], ["y"]),
    ]
    zero = helper.make_tensor("zero", TensorProto.FLOAT, [], [0.0])
    inside = [float_value("chosen", shape=[2])]
    graph = helper.make_graph(
        nodes, "g", [float_value("x", shape=[2])], [float_value("y", shape=[2])], [zero], value_info=inside
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    part = cut(model.SerializeToString(), ["chosen"])
    assert [node.op_type for node in onnx.load_from_string(part).graph.node] == ["Add", "ReduceMax", "Greater", "If"]
    session = onnxruntime.InferenceSession(part, providers=["CPUExecutionProvider"])
    for x, wanted in (([1, 2], [3, 6]), ([-1, -2], [1, 2])):
        np.testing.assert_array_equal(session.run(None, {"x": np.array(x, "f4")})[0], wanted)


def test_tensors_in_other_files_are_not_followed():
    weight = TensorProto(name="w", dims=[2], data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    weight.external_data.add(key="location", value="../../secret")
    put = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "g", put[:1], put[1:], [weight])
    with pytest.raises(CutError, match="tensors are in other files"):
        cut(helper.make_model(graph).SerializeToString(), ["y"])
    with pytest.raises(CutError, match="no ONNX model"):
        values_of(b"no model")
