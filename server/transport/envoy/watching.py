"""Finds the calls that nobody waits for any more: Envoy tells that a caller has left only to who asks."""

import asyncio
from typing import Final

from layercast.server.transport.envoy.context import EnvoyContext
from layercast.server.transport.rpc_call import Cause

EVERY: Final = 0.02
"""Seconds between two looks. Most calls are answered before the first, and cost nothing here."""
_AT_MOST: Final = 64
"""Calls looked at each time, those first that were looked at longest ago: asking is work for Envoy and for Python."""


class Watching:
    """The open calls of a server. Its clock stands still while there are none."""

    def __init__(self) -> None:
        # In the order in which they were looked at.
        self._calls: dict[EnvoyContext, None] = {}
        self._timer: asyncio.TimerHandle | None = None

    def add(self, call: EnvoyContext) -> None:
        """Look after `call`."""
        self._calls[call] = None
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(EVERY, self._look)

    def discard(self, call: EnvoyContext) -> None:
        """The call has its answer."""
        self._calls.pop(call, None)

    def all(self) -> list[EnvoyContext]:
        """The calls that are open now."""
        return list(self._calls)

    def _look(self) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        for _ in range(min(_AT_MOST, len(self._calls))):
            call = next(iter(self._calls))
            if call.looked > now - EVERY:
                break
            del self._calls[call]
            self._calls[call] = None
            call.looked = now
            if call.deadline is not None and now >= call.deadline + EVERY:
                # The service, which knows better how far the call got, had time to end it.
                call.cancel(Cause.LATE)
            else:
                call.look()
        self._timer = loop.call_later(EVERY, self._look) if self._calls else None
