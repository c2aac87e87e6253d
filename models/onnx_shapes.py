"""Whether the time that an ONNX program takes follows from the shapes of its inputs. Needs `onnx`."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onnx import ModelProto, ValueInfoProto


def steady(content: bytes) -> bool:
    """Tell whether what the program in `content` computes follows from the shapes of its inputs, not from their values.

    It has no branch and no loop, and the shape of every value inside can be inferred from those of the inputs, with
    one row. What the program says of these shapes itself counts for nothing. False also where ONNX can't tell: of
    functions and operators that are not its own, and of bytes that are no program.
    """
    import onnx
    from onnx import shape_inference

    try:
        model = onnx.load_from_string(content)
        _forget_shapes(model)
        graph = shape_inference.infer_shapes(model, data_prop=True).graph
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
    """Let each input have one row, and leave no other shape that anyone may have written."""
    graph = model.graph
    del graph.value_info[:]
    for output in graph.output:
        output.type.tensor_type.ClearField("shape")
    weights = {weight.name for weight in graph.initializer}
    for given in graph.input:
        dimensions = given.type.tensor_type.shape.dim
        if given.name not in weights and dimensions:
            dimensions[0].dim_value = 1


def _fixed(value: "ValueInfoProto") -> bool:
    shape = value.type.tensor_type.shape
    return value.type.tensor_type.HasField("shape") and all(size.HasField("dim_value") for size in shape.dim)
