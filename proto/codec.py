"""Messages to numpy arrays and back, for server and client alike. A malformed message raises CodecError, nothing else.

A tensor may be *raw* (bytes beside the message's list of tensors) or *typed* (numbers in `contents`); one message uses
one of the two. FP16 and BF16 exist only raw.
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np

from layercast.proto.fields import mark
from layercast.proto.messages import InferTensorContents, ModelInferRequest, ModelInferResponse, NamedTensor
from layercast.proto.tensors import (
    DATATYPES,
    MAX_BYTES_ELEMENTS,
    MAX_DIMENSION,
    MAX_RANK,
    AnyArray,
    CodecError,
    Place,
    bytes_elements,
    datatype_of,
    element_count,
    from_bytes,
    little_endian,
    memory_dtype,
    quoted,
    tensor_bytes,
)

__all__ = [
    "DATATYPES",
    "MAX_BYTES_ELEMENTS",
    "MAX_DIMENSION",
    "MAX_INPUTS",
    "MAX_RANK",
    "AnyArray",
    "CodecError",
    "Place",
    "Tensor",
    "datatype_of",
    "decode_inputs",
    "decode_named",
    "decode_outputs",
    "fill_inputs",
    "fill_outputs",
    "from_bytes",
    "is_typed",
    "named_tensor",
    "quoted",
    "tensor_bytes",
]

MAX_INPUTS = 64

# Name, datatype, array.
Tensor = tuple[str, str, AnyArray]

# Which list of InferTensorContents holds a datatype, and the type of that list's elements.
TYPED_FIELDS: dict[str, tuple[str, str]] = {
    "BOOL": ("bool_contents", "bool"),
    "INT8": ("int_contents", "<i4"),
    "INT16": ("int_contents", "<i4"),
    "INT32": ("int_contents", "<i4"),
    "INT64": ("int64_contents", "<i8"),
    "UINT8": ("uint_contents", "<u4"),
    "UINT16": ("uint_contents", "<u4"),
    "UINT32": ("uint_contents", "<u4"),
    "UINT64": ("uint64_contents", "<u8"),
    "FP32": ("fp32_contents", "<f4"),
    "FP64": ("fp64_contents", "<f8"),
    "BYTES": ("bytes_contents", "O"),
}

# Lists whose elements have one size on the wire (a bool is a varint of one byte).
_FIXED_SIZE = ("bool_contents", "fp32_contents", "fp64_contents")
# Elements that are turned into Python objects, or from them, in one go: a few milliseconds' worth.
_PART = 1 << 16


class _InferTensor(Protocol):
    """What an input tensor of a request and an output tensor of a response have in common."""

    name: str
    datatype: str

    @property
    def shape(self) -> Sequence[int]: ...
    @property
    def contents(self) -> InferTensorContents: ...


def decode_inputs(request: ModelInferRequest) -> dict[str, AnyArray]:
    """The request's inputs by name, as read-only arrays; fixed-size raw inputs are views of the message's bytes."""
    _check_names([tensor.name for tensor in request.inputs], "input", MAX_INPUTS)
    for index, tensor in enumerate(request.inputs):
        if "shared_memory_region" in tensor.parameters:
            where = f"inputs[{index}].parameters"
            raise CodecError(where, f"input {quoted(tensor.name)}: shared memory is not supported; send the bytes")
    return _decode(request.inputs, request.raw_input_contents, "input")


def decode_outputs(response: ModelInferResponse) -> dict[str, AnyArray]:
    """The response's outputs by name, raw or typed."""
    _check_names([tensor.name for tensor in response.outputs], "output", None)
    return _decode(response.outputs, response.raw_output_contents, "output")


def decode_named(
    tensors: Sequence[NamedTensor], *, kind: str = "input", limit: int | None = MAX_INPUTS
) -> dict[str, AnyArray]:
    """Tensors of the feature service by name. `kind` is the noun for error texts, `limit` how many are accepted."""
    _check_names([tensor.name for tensor in tensors], kind, limit)
    arrays = {}
    for index, tensor in enumerate(tensors):
        place = Place(f"{kind} {quoted(tensor.name)}", f"{kind}s[{index}]", f"{kind}s[{index}].data")
        arrays[tensor.name] = from_bytes(tensor.data, tensor.datatype, tensor.shape, place)
    return arrays


def is_typed(request: ModelInferRequest) -> bool:
    """Did the sender use `contents`? Then it should be answered the same way."""
    return not request.raw_input_contents and any(tensor.contents.ListFields() for tensor in request.inputs)


def fill_inputs(request: ModelInferRequest, tensors: Iterable[Tensor]) -> None:
    """Append raw inputs to the request."""
    for name, datatype, array in tensors:
        request.inputs.add(name=name, datatype=datatype, shape=array.shape)
        request.raw_input_contents.append(tensor_bytes(array, datatype))


def fill_outputs(response: ModelInferResponse, tensors: Sequence[Tensor], typed: bool) -> None:
    """Append outputs to the response; typed when asked, unless one has no typed form: then all of them go raw."""
    typed = typed and all(datatype in TYPED_FIELDS for _, datatype, _ in tensors)
    for name, datatype, array in tensors:
        output = response.outputs.add(name=name, datatype=datatype, shape=array.shape)
        if typed:
            _fill_contents(output.contents, datatype, array)
        else:
            response.raw_output_contents.append(tensor_bytes(array, datatype))


def named_tensor(name: str, datatype: str, array: AnyArray) -> NamedTensor:
    """A tensor for the feature service."""
    return NamedTensor(name=name, datatype=datatype, shape=array.shape, data=tensor_bytes(array, datatype))


def _check_names(names: Sequence[str], kind: str, limit: int | None) -> None:
    if limit is not None and len(names) > limit:
        raise CodecError(f"{kind}s", f"{len(names)} {kind}s; at most {limit} are allowed")
    seen: set[str] = set()
    for index, name in enumerate(names):
        if name in seen:
            raise CodecError(f"{kind}s[{index}].name", f"{kind} {quoted(name)} is given twice")
        seen.add(name)


def _decode(tensors: Sequence[_InferTensor], raws: Sequence[bytes], kind: str) -> dict[str, AnyArray]:
    raw_field = f"raw_{kind}_contents"
    if raws and len(raws) != len(tensors):
        counts = f"{raw_field} has {len(raws)} entries for {len(tensors)} {kind}s"
        raise CodecError(raw_field, f"{counts}; send one for each, in the same order")
    arrays = {}
    for index, tensor in enumerate(tensors):
        place = Place(f"{kind} {quoted(tensor.name)}", f"{kind}s[{index}]", f"{raw_field}[{index}]")
        if not raws:
            arrays[tensor.name] = _from_contents(tensor, place)
            continue
        if tensor.contents.ListFields():
            both = f"contents and {raw_field} are both set; use one of them"
            raise place.error(f"{place.tensor}.contents", both)
        arrays[tensor.name] = from_bytes(raws[index], tensor.datatype, tensor.shape, place)
    return arrays


def _from_contents(tensor: _InferTensor, place: Place) -> AnyArray:
    dtype = memory_dtype(tensor.datatype, place)
    count = element_count(tensor.shape, place)
    if tensor.datatype not in TYPED_FIELDS:
        rule = f"no typed field for FP16/BF16; send raw bytes ({place.data})"
        raise place.error(f"{place.tensor}.contents", rule)
    wanted, carrier = TYPED_FIELDS[tensor.datatype]
    for descriptor, _ in tensor.contents.ListFields():
        if descriptor.name != wanted:
            wrong = f"{tensor.datatype} elements belong in {wanted}, got {descriptor.name}"
            raise place.error(f"{place.tensor}.contents.{descriptor.name}", wrong)
    values = getattr(tensor.contents, wanted)
    field = f"{place.tensor}.contents.{wanted}"
    if len(values) != count:
        needs = f"shape {list(tensor.shape)} takes {count} elements, {wanted} has {len(values)}"
        raise place.error(field, needs if values else f"{needs}; send them there or as {place.data}")
    if tensor.datatype == "BYTES" and count > MAX_BYTES_ELEMENTS:
        raise place.error(field, f"{count} BYTES elements; at most {MAX_BYTES_ELEMENTS} are allowed")
    array = _narrowed(_elements(tensor.contents, values, wanted, np.dtype(carrier), count), dtype, place, field)
    array.flags.writeable = False
    return array.reshape(tuple(tensor.shape))


def _elements(
    contents: InferTensorContents, values: Iterable[object], wanted: str, carrier: np.dtype[np.generic], count: int
) -> AnyArray:
    """The `count` elements of the one list that is set, as an array."""
    if wanted not in _FIXED_SIZE:
        source, array = iter(values), np.empty(count, carrier)
        # In parts, since one call keeps every other thread waiting until it returns.
        for start in range(0, count, _PART):
            part = array[start : start + _PART]
            part[:] = np.fromiter(itertools.islice(source, len(part)), carrier, len(part))
        return array
    # On the wire these lists are arrays already: a tag of one byte, a length, the elements. Reading them from there
    # is a hundred times faster than one Python object for each.
    contents.DiscardUnknownFields()
    wire = contents.SerializeToString()
    return (
        np.frombuffer(wire, carrier, count, offset=len(wire) - count * carrier.itemsize)
        if count
        else np.empty(0, carrier)
    )


def _narrowed(values: AnyArray, dtype: np.dtype[np.generic], place: Place, field: str) -> AnyArray:
    """INT8 and its like travel in wider lists; a value outside their range is refused, not wrapped."""
    if dtype.kind in "iu" and dtype.itemsize < values.dtype.itemsize and values.size:
        bounds = np.iinfo(dtype.name)
        low, high = int(values.min()), int(values.max())
        if low < bounds.min or high > bounds.max:
            worst = low if low < bounds.min else high
            raise place.error(field, f"{worst} is outside {dtype.name}, {bounds.min} to {bounds.max}")
    return values.astype(dtype, copy=False)


def _fill_contents(contents: InferTensorContents, datatype: str, array: AnyArray) -> None:
    field = TYPED_FIELDS[datatype][0]
    if field in _FIXED_SIZE:
        content = little_endian(array, datatype).tobytes()
        contents.MergeFromString(mark(InferTensorContents, field, len(content)) + content)
        return
    elements = array if datatype == "BYTES" else little_endian(array, datatype)
    flat, target = elements.ravel(), getattr(contents, field)
    for start in range(0, flat.size, _PART):
        part = flat[start : start + _PART]
        target.extend(bytes_elements(part) if datatype == "BYTES" else part.tolist())
