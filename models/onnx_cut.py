"""Cuts an ONNX model: values from inside become its outputs, and what they do not need is gone. Needs `onnx`."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from onnx import ModelProto

_NUMPY: Final = frozenset(
    {"FLOAT", "DOUBLE", "FLOAT16", "BOOL", "INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64"}
)
"""Types that ONNX Runtime hands out as arrays."""


class CutError(ValueError):
    """The model cannot be cut; the text says why."""


def cut(content: bytes, values: Sequence[str]) -> bytes:
    """Return the model in `content` with `values` as its outputs, in that order, and all of its inputs.

    CutError for bytes that are no model, a value that it does not have, and tensors kept in other files.
    """
    from onnx.utils import Extractor

    model = _parsed(content)
    try:
        smaller = Extractor(model).extract_model([put.name for put in model.graph.input], list(values))
    except ValueError as error:
        raise CutError(str(error)) from error
    return bytes(smaller.SerializeToString())


def values_of(content: bytes) -> list[str]:
    """Return the names of the values that the model computes and that could be its outputs, in order of execution."""
    from onnx import TensorProto

    graph = _parsed(content).graph
    types = {
        value.name: TensorProto.DataType.Name(value.type.tensor_type.elem_type)
        for value in (*graph.value_info, *graph.output)
        if value.type.HasField("tensor_type")
    }
    return [name for node in graph.node for name in node.output if types.get(name) in _NUMPY]


def _parsed(content: bytes) -> "ModelProto":
    import onnx

    try:
        model = onnx.load_from_string(content)
    except Exception as error:  # protobuf's own, which onnx does not name
        raise CutError("it is no ONNX model") from error
    if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in model.graph.initializer):
        raise CutError("its tensors are in other files")
    return model
