"""A bound on what costs the server work and its peer nothing: pings, resets, empty frames."""

import time
from typing import Final

from layercast.server.transport.direct.frames import Code, ConnectionFault

_MOST: Final = 10_000
_PER_SECOND: Final = 1_000
ANSWERED: Final = 8
"""What an answered call earns: pings and windows come with real traffic too."""
SENT: Final = 4
"""What a frame of data earns that was sent: a peer opens a window or two for each."""


class Calm:
    """What one connection may still waste: so much at once, then so much a second, and more with every real call."""

    __slots__ = ("_filled", "_left")

    def __init__(self) -> None:
        self._left = _MOST
        self._filled = time.monotonic()

    def earn(self, many: int) -> None:
        """Something useful was done."""
        self._left = min(_MOST, self._left + many)

    def spend(self, many: int = 1) -> None:
        """A frame came that does nothing, or costs as much as so many; ConnectionFault when there were too many."""
        self._left -= many
        if self._left < 0:
            now = time.monotonic()
            self._left = min(_MOST, int((now - self._filled) * _PER_SECOND)) - many
            self._filled = now
            if self._left < 0:
                raise ConnectionFault(Code.ENHANCE_YOUR_CALM, "too many pings, resets or other frames without a call")
