"""Where the servers of tests run: each on an event loop of its own, or, when the tests run inside Envoy, on Envoy's."""

import asyncio
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

DEFAULT = "direct"
"""The front end of servers in tests that don't care; `test_front_ends.py` runs the protocol's tests with the other."""
OTHER = "direct" if DEFAULT == "grpcio" else "grpcio"
_CHOSEN = os.environ.get("LAYERCAST_TEST_FRONT_END", DEFAULT)


@dataclass
class Envoy:
    """The Envoy that this process is: the loop that it has for Python, and its ports that no server answers on."""

    loop: asyncio.AbstractEventLoop
    free: list[int]


envoy: Envoy | None = None
"""Set by `in_envoy.py`."""


def front_end_name() -> str:
    """Return the front end of servers in tests that don't care."""
    return "envoy" if envoy else _CHOSEN


@contextmanager
def event_loop(front_end: str | None = None) -> Iterator[asyncio.AbstractEventLoop]:
    """Yield a running event loop of another thread, of the kind that `front_end` has when it serves."""
    if envoy:
        yield envoy.loop
        return
    loop = _uvloop() if (front_end or front_end_name()) == "direct" else asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="server-loop")
    thread.start()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@contextmanager
def front_end(name: str | None = None) -> Iterator[dict[str, object]]:
    """Yield the settings of the front end under test, or of the one with that name, on free ports."""
    if not envoy:
        yield {"front_end": name or front_end_name(), "grpc_port": 0, "http_port": 0}
        return
    ports = [envoy.free.pop(), envoy.free.pop()]
    try:
        yield {"front_end": "envoy", "grpc_port": ports[0], "http_port": ports[1]}
    finally:
        envoy.free += ports


def _uvloop() -> asyncio.AbstractEventLoop:
    import uvloop

    return uvloop.new_event_loop()
