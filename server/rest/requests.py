"""An inference request over HTTP as the protocol's message: JSON, binary tensors behind JSON, or one bare tensor.

Every input becomes raw bytes, so the service sees the same message as from a gRPC client.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from layercast.proto.codec import DATATYPES, MAX_INPUTS, CodecError, Place, quoted, tensor_bytes
from layercast.proto.messages import ModelInferRequest, ModelMetadataResponse
from layercast.server.errors import InvalidArgument
from layercast.server.layers import MAX_PATTERNS
from layercast.server.rest.documents import array_from, parse
from layercast.server.rest.messages import fill_parameters

JSON_LENGTH = "inference-header-content-length"
"""Header with the length of the JSON part of a body, in bytes, where binary tensors follow it."""

_INT64 = 1 << 63


@dataclass(frozen=True)
class Forms:
    """Which outputs of the answer are binary; `named` has those asked for by their own name."""

    named: Mapping[str, bool]
    otherwise: bool

    def binary(self, name: str) -> bool:
        """Return whether the output `name` goes behind the JSON, as bytes."""
        return self.named.get(name, self.otherwise)


def json_length(header: str | None, size: int) -> int:
    """Return how many of a body's `size` bytes are JSON, by the header; all of them without one."""
    if header is None:
        return size
    if not (header.isascii() and header.isdecimal() and len(header) < 20) or int(header) > size:
        raise InvalidArgument(
            f"header Inference-Header-Content-Length is {quoted(header)}; want the bytes of JSON in the body of {size}"
        )
    return int(header)


def read_request(model: str, version: str, body: bytes | bytearray, length: int) -> tuple[ModelInferRequest, Forms]:
    """Return the message for a body whose first `length` bytes are JSON, and the forms its answer takes."""
    view = memoryview(body)
    document = parse(view[:length])
    if not isinstance(document, dict):
        raise InvalidArgument('the body must be a JSON object, as {"inputs": [...]}')
    try:
        message = ModelInferRequest(model_name=model, model_version=version, id=_text(document, "id", "id", ""))
        given = document.get("parameters") or {}
        binary = _flag(given, "binary_data_output", "parameters", default=False)
        fill_parameters(message.parameters, _without(given, "binary_data_output"), "parameters")
        _fill_inputs(message, document.get("inputs"), view[length:])
        return message, _fill_outputs(message, document.get("outputs"), binary)
    except CodecError as error:
        raise InvalidArgument(str(error), field=error.field) from error
    except UnicodeEncodeError as error:
        raise InvalidArgument("a string has half of a surrogate pair, which is no text") from error


def bare_request(
    model: str, version: str, body: bytes | bytearray, metadata: ModelMetadataResponse
) -> tuple[ModelInferRequest, Forms]:
    """Return the message for a body that is the one input's bytes: one row, every output binary.

    At most one dimension besides the batch may be open in the model's description; it follows from the size. A BYTES
    input of shape [1] is the body, without a length before it.
    """
    if len(metadata.inputs) != 1:
        names = ", ".join(tensor.name for tensor in metadata.inputs)
        raise InvalidArgument(f"a bare binary body is for models with one input; {quoted(model)} takes {names}")
    (spec,) = metadata.inputs
    message = ModelInferRequest(model_name=model, model_version=version)
    tensor = message.inputs.add(name=spec.name, datatype=spec.datatype)
    if spec.datatype == "BYTES":
        tensor.shape.extend([1] * len(spec.shape))
        message.raw_input_contents.append(len(body).to_bytes(4, "little") + body)
    else:
        tensor.shape.extend(_bare_shape(list(spec.shape), spec.datatype, len(body)))
        message.raw_input_contents.append(bytes(body))
    return message, Forms({}, True)


def _bare_shape(shape: list[int], datatype: str, size: int) -> list[int]:
    shape[0] = 1 if shape[0] == -1 else shape[0]
    if shape.count(-1) > 1:
        raise InvalidArgument(f"a bare binary body leaves the input's shape {shape} open; send JSON before it")
    item = 2 if datatype == "BF16" else DATATYPES[datatype].itemsize
    known = math.prod(extent for extent in shape if extent != -1) * item
    return [size // known if extent == -1 else extent for extent in shape]


def _fill_inputs(message: ModelInferRequest, inputs: Any, tail: memoryview) -> None:
    if not isinstance(inputs, list):
        raise InvalidArgument("inputs is missing; want a list of tensors", field="inputs")
    if len(inputs) > MAX_INPUTS:
        raise InvalidArgument(f"{len(inputs)} inputs; at most {MAX_INPUTS} are allowed", field="inputs")
    at = 0
    for position, given in enumerate(inputs):
        field = f"inputs[{position}]"
        _object(given, field)
        tensor = message.inputs.add(
            name=_text(given, "name", field), datatype=_text(given, "datatype", field), shape=_shape(given, field)
        )
        parameters = given.get("parameters") or {}
        fill_parameters(tensor.parameters, _without(parameters, "binary_data_size"), f"{field}.parameters")
        if "shared_memory_region" in parameters:
            continue  # the service says whether it takes it
        place = Place(f"input {quoted(tensor.name)}", field, f"{field}.data")
        if "binary_data_size" in parameters:
            size = _size(parameters["binary_data_size"], len(tail) - at, given, place)
            message.raw_input_contents.append(bytes(tail[at : at + size]))
            at += size
        elif "data" in given:
            values = array_from(given["data"], tensor.datatype, list(tensor.shape), place)
            message.raw_input_contents.append(tensor_bytes(values, tensor.datatype))
        else:
            raise place.error(place.data, "has neither data nor the parameter binary_data_size")
    if at != len(tail):
        raise InvalidArgument(
            f"{len(tail) - at} bytes follow the binary data of the last input; the sizes in binary_data_size add up "
            f"to {at}, the body has {len(tail)} after its JSON"
        )


def _size(size: Any, left: int, given: Mapping[str, Any], place: Place) -> int:
    if "data" in given:
        raise place.error(place.data, "has both data and the parameter binary_data_size; use one of them")
    if not _whole(size) or size < 0:
        raise place.error(place.data, "parameter binary_data_size must be a whole number of bytes")
    if size > left:
        raise place.error(
            place.data,
            f"binary_data_size is {size}, {left} bytes are left in the body; the JSON part ends where the header "
            "Inference-Header-Content-Length says",
        )
    return int(size)


def _fill_outputs(message: ModelInferRequest, outputs: Any, binary: bool) -> Forms:
    outputs = [] if outputs is None else outputs
    if not isinstance(outputs, list):
        raise InvalidArgument("outputs must be a list", field="outputs")
    if len(outputs) > MAX_PATTERNS:
        raise InvalidArgument(f"{len(outputs)} outputs are asked for, at most {MAX_PATTERNS} may be", field="outputs")
    named = {}
    for position, given in enumerate(outputs):
        field = f"outputs[{position}]"
        _object(given, field)
        output = message.outputs.add(name=_text(given, "name", field))
        parameters = given.get("parameters") or {}
        named[output.name] = _flag(parameters, "binary_data", f"{field}.parameters", default=binary)
        fill_parameters(output.parameters, _without(parameters, "binary_data"), f"{field}.parameters")
    # The answer names each layer that a pattern selects, so those names are not in the request.
    return Forms(named, any(named.values()) if named else binary)


def _object(given: Any, field: str) -> None:
    if not isinstance(given, dict):
        raise InvalidArgument(f"{field} must be an object", field=field)


def _text(given: Mapping[str, Any], key: str, field: str, default: str | None = None) -> str:
    value = given.get(key, default)
    if not isinstance(value, str):
        where = field if field == key else f"{field}.{key}"
        raise InvalidArgument(f"{where} {'must be a string' if key in given else 'is missing'}", field=where)
    return value


def _shape(given: Mapping[str, Any], field: str) -> list[int]:
    shape = given.get("shape")
    if not isinstance(shape, list) or not all(_whole(size) and -_INT64 <= size < _INT64 for size in shape):
        raise InvalidArgument(f"{field}.shape must be a list of whole numbers", field=f"{field}.shape")
    return shape


def _whole(value: Any) -> bool:
    return type(value) is int


def _flag(given: Any, key: str, field: str, *, default: bool) -> bool:
    _object(given, field)
    value = given.get(key, default)
    if not isinstance(value, bool):
        raise InvalidArgument(f"{field}.{key} must be true or false", field=f"{field}.{key}")
    return value


def _without(given: Any, key: str) -> Any:
    return {name: value for name, value in given.items() if name != key} if isinstance(given, dict) else given
