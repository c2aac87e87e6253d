"""The header `grpc-timeout`, as gRPC and REST callers send it: `250m` is 250 milliseconds."""

import re
from typing import Final

from layercast.proto.codec import quoted
from layercast.server.errors import InvalidArgument

_TIMEOUT: Final = re.compile(r"([0-9]{1,8})([HMSmun])")
_SECONDS: Final = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}


def seconds_of(given: str) -> float:
    """Return the seconds that the header gives; InvalidArgument when it is none."""
    found = _TIMEOUT.fullmatch(given)
    if found is None:
        raise InvalidArgument(f"header grpc-timeout is {quoted(given)}; want digits and a unit of H M S m u n, as 250m")
    return int(found[1]) * _SECONDS[found[2]]
