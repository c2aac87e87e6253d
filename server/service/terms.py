"""On what terms a request's rows wait: from its call, and from its parameters `priority` and `timeout` as in Triton."""

from collections.abc import Mapping
from typing import Final

from layercast.proto.messages import InferParameter
from layercast.server.service.call import Call
from layercast.server.work import Terms

NO_PARAMETERS: Final[Mapping[str, InferParameter]] = {}


def terms_of(call: Call, parameters: Mapping[str, InferParameter]) -> Terms:
    """Return the terms of a request whose parameters have been checked (`parameters.check_parameters`).

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
    return int(getattr(parameters[name], parameters[name].WhichOneof("parameter_choice") or ""))
