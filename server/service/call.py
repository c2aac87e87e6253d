"""What a service is told of a call besides its message, and where the method is that answers it."""

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(slots=True)
class Call:
    """`deadline` is on the event loop's clock, in seconds; None when the caller set none. `size` is the message's.

    `fails_whole` is for streams: end with the first error's status instead of carrying errors inside the stream.
    `peer` is who calls.
    """

    deadline: float | None = None
    size: int = 0
    fails_whole: bool = False
    peer: str = ""


def method_of(services: Sequence[object], rpc: str) -> Any | None:
    """Return the method that answers the RPC `rpc`, of the one object among `services` that has it, or None."""
    name = _snake(rpc)
    return next((getattr(each, name) for each in services if hasattr(each, name)), None)


@functools.cache  # asked for by every request over HTTP; there are few RPCs
def _snake(rpc: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", rpc).lower()
