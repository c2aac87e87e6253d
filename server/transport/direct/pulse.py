"""Whether a peer is still there: the first words of a new one, a ping to a quiet one, the end of one that left."""

import asyncio
from collections.abc import Callable
from typing import Final

_FIRST_SECONDS: Final = 10.0
"""What a peer has to say its first words."""
_QUIET_SECONDS: Final = 60.0
_REPLY_SECONDS: Final = 20.0


class Pulse:
    """Watches one connection until `stop`. `heard` is set whenever something came.

    `greeted` tells whether the first words are there; `silent` is called when they don't come, `ask` to send a ping,
    `gone` when nothing came after one.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        greeted: Callable[[], bool],
        silent: Callable[[], None],
        ask: Callable[[], None],
        gone: Callable[[], None],
    ) -> None:
        self.heard = False
        self._loop = loop
        self._greeted = greeted
        self._silent = silent
        self._ask = ask
        self._gone = gone
        self._clock = loop.call_later(_FIRST_SECONDS, self._see_greeted)

    def stop(self) -> None:
        """Watch no longer."""
        self._clock.cancel()

    def end_within(self, seconds: float) -> None:
        """The connection is to close: call `gone` if it is still there after so long."""
        self._clock.cancel()
        self._clock = self._loop.call_later(seconds, self._gone)

    def _see_greeted(self) -> None:
        if self._greeted():
            self._see_heard()
        else:
            self._silent()

    def _see_heard(self) -> None:
        if self.heard:
            self.heard = False
            self._clock = self._loop.call_later(_QUIET_SECONDS, self._see_heard)
        else:
            self._ask()
            self._clock = self._loop.call_later(_REPLY_SECONDS, self._see_answered)

    def _see_answered(self) -> None:
        if self.heard:
            self._see_heard()
        else:
            self._gone()
