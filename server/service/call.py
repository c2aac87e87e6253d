"""What a service is told of a call besides its message."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Call:
    """`deadline` is on the event loop's clock, in seconds; None when the caller set none. `peer` is who calls."""

    deadline: float | None = None
    peer: str = ""
