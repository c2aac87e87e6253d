"""Cuts an ONNX model: values from inside become its outputs, and what they do not need is gone. Needs `onnx`."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, ValueInfoProto

_NUMPY: Final = frozenset(
    {"FLOAT", "DOUBLE", "FLOAT16", "BOOL", "INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64"}
)
"""Types that ONNX Runtime hands out as arrays."""


class CutError(ValueError):
    """The model cannot be cut; the text says why."""


def cut(content: bytes, values: Sequence[str], types: Mapping[str, int] | None = None) -> bytes:
    """Return the model in `content` with `values` as its outputs, in that order, and all of its inputs.

    It is cut in place, since every copy of large weights keeps Python's lock for a while. CutError for bytes that are
    no model, a value of which neither the model nor `types` (onnx.TensorProto.DataType) say the type, and tensors kept
    in other files.
    """
    model = parsed(content)
    graph = model.graph
    known = {value.name: value for value in (*graph.value_info, *graph.output)}
    made = {name for node in graph.node for name in node.output} if types else set()
    for name in values:
        if name in made and name not in known and types and name in types:
            known[name] = _untold(name, types[name])
        if name not in known:
            raise CutError(f"it has no value {name!r}")
    _keep(graph, values)
    outputs = [known[name] for name in values]
    del graph.output[:]
    graph.output.extend(outputs)
    return bytes(model.SerializeToString())


def remaining(content: bytes, value: str) -> bytes:
    """Return the model in `content` with `value` as an input, and only those of its own that it still needs.

    CutError as for `cut`.
    """
    model = parsed(content)
    graph = model.graph
    known = {each.name: each for each in graph.value_info}
    if value not in known:
        raise CutError(f"it has no value {value!r} inside")
    needed = _keep(graph, [output.name for output in graph.output], value)
    inputs = [known[value], *(each for each in graph.input if each.name in needed)]
    del graph.input[:]
    graph.input.extend(inputs)
    return bytes(model.SerializeToString())


def _untold(name: str, kind: int) -> "ValueInfoProto":
    from onnx import helper

    return helper.make_tensor_value_info(name, kind, None)


def _keep(graph: "GraphProto", values: Sequence[str], given: str = "") -> set[str]:
    """Remove the nodes and weights that `values` do not need, and those that only the value `given` needs.

    Return the names of all that is needed.
    """
    needed = set(values)
    for place in reversed(range(len(graph.node))):
        if any(name and name != given and name in needed for name in graph.node[place].output):
            needed.update(read(graph.node[place]))
        else:
            del graph.node[place]
    for place in reversed(range(len(graph.initializer))):
        if graph.initializer[place].name not in needed:
            del graph.initializer[place]
    return needed


def read(node: "NodeProto") -> Iterator[str]:
    """Yield the names of the values that `node` reads, also inside its branches and loops."""
    yield from node.input
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            for inner in graph.node:
                yield from read(inner)
            yield from (output.name for output in graph.output)  # a branch may give a value from outside as it is


def values_of(content: bytes) -> list[str]:
    """Return the names of the values that the model computes and that could be its outputs, in order of execution."""
    from onnx import TensorProto

    graph = parsed(content).graph
    types = {
        value.name: TensorProto.DataType.Name(value.type.tensor_type.elem_type)
        for value in (*graph.value_info, *graph.output)
        if value.type.HasField("tensor_type")
    }
    return [name for node in graph.node for name in node.output if types.get(name) in _NUMPY]


def parsed(content: bytes) -> "ModelProto":
    """Return the model in `content`; CutError for bytes that are none, and for tensors kept in other files."""
    import onnx

    try:
        model = onnx.load_from_string(content)
    except Exception as error:  # protobuf's own, which onnx does not name
        raise CutError("it is no ONNX model") from error
    if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in model.graph.initializer):
        raise CutError("its tensors are in other files")
    return model
