"""On what terms a request's rows wait: from its call, and from its parameters `priority` and `timeout` as in Triton."""

from collections.abc import Mapping
from typing import Final

from layercast.proto.messages import InferParameter
from layercast.server.errors import InvalidArgument
from layercast.server.service.call import Call
from layercast.server.work import Terms

NO_PARAMETERS: Final[Mapping[str, InferParameter]] = {}


def terms_of(call: Call, parameters: Mapping[str, InferParameter]) -> Terms:
    """Return the terms; InvalidArgument for a parameter that is no whole number or negative.

    `priority` 1 is the highest level, 0 the model's default. `timeout` is in microseconds, 0 for the model's own.
    """
    microseconds = _whole(parameters, "timeout")
    return Terms(
        deadline=call.deadline,
        timeout=microseconds / 1e6 if microseconds else None,
        priority=_whole(parameters, "priority"),
        peer=call.peer,
    )


def _whole(parameters: Mapping[str, InferParameter], name: str) -> int:
    if name not in parameters:
        return 0
    parameter = parameters[name]
    kind = parameter.WhichOneof("parameter_choice")
    value = getattr(parameter, kind) if kind in ("int64_param", "uint64_param") else None
    if value is None or value < 0:
        got = f"{value}" if value is not None else kind or "nothing"
        raise InvalidArgument(
            f"parameter {name!r}: want int64_param or uint64_param, 0 or more, got {got}", field=f"parameters[{name}]"
        )
    return int(value)
