"""Parameters and whole messages as JSON, under the names that the .proto files give their fields."""

import base64
import binascii
import math
from collections.abc import Mapping
from typing import Any

from google.protobuf.message import Message

from layercast.proto.codec import quoted
from layercast.proto.messages import InferParameter, ModelRepositoryParameter
from layercast.server.errors import InvalidArgument

_INT64, _UINT64 = 1 << 63, 1 << 64


def fill_parameters(target: Any, given: Any, field: str) -> None:
    """Copy a JSON object of parameters into a message's map; InvalidArgument names one that is no scalar."""
    if given is None:
        return
    if not isinstance(given, dict):
        raise InvalidArgument(f"{field} must be an object", field=field)
    for key, value in given.items():
        if isinstance(value, bool):
            target[key].bool_param = value
        elif isinstance(value, str):
            target[key].string_param = value
        elif isinstance(value, float):
            target[key].double_param = value
        elif isinstance(value, int) and -_INT64 <= value < _INT64:
            target[key].int64_param = value
        elif isinstance(value, int) and _INT64 <= value < _UINT64:
            target[key].uint64_param = value
        else:
            raise InvalidArgument(
                f"parameter {quoted(key)}: want true or false, a string or a 64-bit number", field=f"{field}.{key[:64]}"
            )


def fill_repository_parameters(target: Any, given: Any) -> None:
    """Like `fill_parameters`, for loading: no floats, and the content of `file:` parameters in base64."""
    if given is not None and not isinstance(given, dict):
        raise InvalidArgument("parameters must be an object", field="parameters")
    for key, value in (given or {}).items():
        parameter: ModelRepositoryParameter = target[key]
        if isinstance(value, bool):
            parameter.bool_param = value
        elif isinstance(value, str) and key.startswith("file:"):
            try:
                parameter.bytes_param = base64.b64decode(value, validate=True)
            except binascii.Error as error:
                raise InvalidArgument(f"parameter {quoted(key)} is not base64: {error}", field="parameters") from error
        elif isinstance(value, str):
            parameter.string_param = value
        elif isinstance(value, int) and -_INT64 <= value < _INT64:
            parameter.int64_param = value
        else:
            raise InvalidArgument(
                f"parameter {quoted(key)}: want true or false, a string or a whole number", field="parameters"
            )


def parameters_of(given: Mapping[str, InferParameter]) -> dict[str, Any]:
    """Return parameters as JSON values; a float that JSON has not becomes null."""
    return {key: _plain(_choice(value)) for key, value in given.items()}


def _choice(parameter: Message) -> Any:
    name = parameter.WhichOneof("parameter_choice")
    return getattr(parameter, name) if name else None


def as_json(message: Message) -> dict[str, Any]:
    """Return a message as JSON values: every plain field, also one at its default; 64-bit integers as numbers."""
    found: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            of = field.message_type.fields_by_name["value"]
            found[field.name] = {str(key): _value(of, value[key]) for key in value}
        elif field.is_repeated:
            found[field.name] = [_value(field, item) for item in value]
        elif not field.has_presence or message.HasField(field.name):
            found[field.name] = _value(field, value)
    return found


def _value(field: Any, value: Any) -> Any:
    if field.message_type is not None:
        return as_json(value)
    if field.enum_type is not None:
        known = field.enum_type.values_by_number.get(value)
        return known.name if known else value
    return _plain(value)


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return None if isinstance(value, float) and not math.isfinite(value) else value
