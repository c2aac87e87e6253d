"""Parameters of an inference request: the protocol's own are checked, the rest are the caller's and change nothing."""

from collections.abc import Callable, Mapping
from typing import Final

from layercast.proto.codec import quoted
from layercast.proto.messages import InferParameter, ModelInferRequest
from layercast.server.errors import InvalidArgument, Unimplemented

MAX_PARAMETERS: Final = 64

Check = Callable[[InferParameter, str], None]


def check_parameters(request: ModelInferRequest) -> None:
    """Raise InvalidArgument for a parameter that is malformed, Unimplemented for one that asks for what is not done."""
    _check(request.parameters, "parameters", _REQUEST)
    for position, tensor in enumerate(request.inputs):
        if tensor.parameters:
            _check(tensor.parameters, f"inputs[{position}].parameters", _TENSOR)
    for position, output in enumerate(request.outputs):
        if output.parameters:
            _check(output.parameters, f"outputs[{position}].parameters", _OUTPUT)


def asks_raw(request: ModelInferRequest) -> bool:
    """Whether the request, or one of its outputs, asks for raw bytes. A response can't hold raw and typed outputs."""
    wanted = "binary_data_output" in request.parameters and request.parameters["binary_data_output"].bool_param
    return wanted or any(
        output.parameters["binary_data"].bool_param for output in request.outputs if "binary_data" in output.parameters
    )


def _check(parameters: Mapping[str, InferParameter], field: str, known: Mapping[str, Check]) -> None:
    if len(parameters) > MAX_PARAMETERS:
        raise InvalidArgument(f"{len(parameters)} parameters; at most {MAX_PARAMETERS} are allowed", field=field)
    for key, parameter in parameters.items():
        path = f"{field}[{key}]"
        if parameter.WhichOneof("parameter_choice") is None:
            raise InvalidArgument(f"parameter {quoted(key)} has no value; set one of its fields", field=path)
        if key in known:
            known[key](parameter, path)
        elif key.startswith("triton_"):
            raise InvalidArgument(f"parameter {quoted(key)}: the prefix triton_ is reserved", field=path)


def _one_of(*kinds: str, least: int | None = None) -> Check:
    """Return a check that the value is in one of the fields `kinds`, and not below `least`."""

    def check(parameter: InferParameter, path: str) -> None:
        kind = parameter.WhichOneof("parameter_choice") or ""
        if kind not in kinds:
            raise InvalidArgument(f"{path}: want {' or '.join(kinds)}, got {kind}", field=path)
        value = getattr(parameter, kind)
        if least is not None and value < least:
            raise InvalidArgument(f"{path}: want at least {least}, got {value}", field=path)

    return check


def _reserved(parameter: InferParameter, path: str) -> None:
    raise InvalidArgument(f"{path}: this name is reserved", field=path)


def _sequences(parameter: InferParameter, path: str) -> None:
    # Zero, "" and false say that the request belongs to no sequence.
    if getattr(parameter, parameter.WhichOneof("parameter_choice") or ""):
        raise Unimplemented(
            f"{path}: sequences are not supported, no model here keeps state between requests", field=path
        )


def _shared_memory(parameter: InferParameter, path: str) -> None:
    raise Unimplemented(f"{path}: shared memory is not offered; send the bytes in the message", field=path)


_flag: Final = _one_of("bool_param")
_TENSOR: Final[dict[str, Check]] = {
    "shared_memory_region": _shared_memory,
    "shared_memory_byte_size": _shared_memory,
    "shared_memory_offset": _shared_memory,
}
_OUTPUT: Final[dict[str, Check]] = {**_TENSOR, "classification": _one_of("int64_param"), "binary_data": _flag}
_REQUEST: Final[dict[str, Check]] = {
    **_TENSOR,
    "sequence_id": _sequences,
    "sequence_start": _sequences,
    "sequence_end": _sequences,
    "headers": _reserved,
    "priority": _one_of("uint64_param", "int64_param", least=0),
    "timeout": _one_of("int64_param", "uint64_param", least=0),
    "binary_data_output": _flag,
    "triton_enable_empty_final_response": _flag,
}
