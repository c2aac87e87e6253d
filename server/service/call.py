"""What a service is told of a call besides its message."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Call:
    """`deadline` is on the event loop's clock, in seconds; None when the caller set none. `size` is the message's.

    `fails_whole` is for streams: end with the first error's status instead of carrying errors inside the stream.
    `peer` is who calls.
    """

    deadline: float | None = None
    size: int = 0
    fails_whole: bool = False
    peer: str = ""
