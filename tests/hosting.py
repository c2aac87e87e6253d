"""Where the servers of tests run: each on an event loop of its own, or, when the tests run inside Envoy, on Envoy's."""

import asyncio
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Envoy:
    """The Envoy that this process is: the loop that it has for Python, and its ports that no server answers on."""

    loop: asyncio.AbstractEventLoop
    free: list[int]


envoy: Envoy | None = None
"""Set by `in_envoy.py`."""


@contextmanager
def event_loop() -> Iterator[asyncio.AbstractEventLoop]:
    """Yield a running event loop of another thread."""
    if envoy:
        yield envoy.loop
        return
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="server-loop")
    thread.start()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@contextmanager
def front_end() -> Iterator[dict[str, object]]:
    """Yield the settings of the front end under test, on free ports."""
    if not envoy:
        yield {"front_end": os.environ.get("LAYERCAST_TEST_FRONT_END", "grpcio"), "grpc_port": 0, "http_port": 0}
        return
    ports = [envoy.free.pop(), envoy.free.pop()]
    try:
        yield {"front_end": "envoy", "grpc_port": ports[0], "http_port": ports[1]}
    finally:
        envoy.free += ports
