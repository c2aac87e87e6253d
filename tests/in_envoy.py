"""Runs pytest inside Envoy, so that tests which reach into their servers have them answer through Envoy.

`python in_envoy.py PYTEST_ARGUMENT...`; the exit code is pytest's, or 70 when something failed beside a test.
"""

import asyncio
import os
import sys
import threading
import traceback
from typing import Any

import hosting
import pytest

from layercast.server.settings import read
from layercast.server.transport.envoy.config import envoy_config
from layercast.server.transport.envoy.front_end import applications
from layercast.server.transport.envoy.process import carried_here, run_envoy
from layercast.server.transport.ports import bound_socket
from layercast.server.transport.signals import INTERRUPTED, wait_for_signals

SERVERS = 6  # at a time


def become() -> None:
    addresses = []
    for _ in range(2 * SERVERS):
        sock = bound_socket("test", "127.0.0.1", 0, "")
        sock.set_inheritable(True)
        addresses.append(sock.getsockname())
        sock.detach()
    config = envoy_config(read({"front_end": "envoy"}), addresses, "in_envoy:entry")
    run_envoy(config, {"ports": [port for _, port in addresses], "arguments": sys.argv[1:]})


async def entry(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "http":
        await applications[scope["server"][1]](scope, receive, send)
        return
    await receive()
    carried = carried_here()
    loop = asyncio.get_running_loop()
    hosting.envoy = hosting.Envoy(loop, carried["ports"])
    faults: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, fault: faults.append(fault))
    wait_for_signals(lambda: os._exit(INTERRUPTED))
    threading.Thread(target=test, args=(carried["arguments"], faults)).start()
    await send({"type": "lifespan.startup.complete"})
    await receive()


def test(arguments: list[str], faults: list[dict[str, Any]]) -> None:
    code = 70
    try:
        # anyio, whose plugin for pytest nothing here uses, came with the server.
        own = (
            "-p",
            "no:cacheprovider",
            "-o",
            "timeout_method=thread",
            "-W",
            "ignore::pytest.PytestAssertRewriteWarning",
        )
        code = pytest.main([*own, *arguments])
        for fault in faults:
            print("on Envoy's loop:", fault.get("message"), repr(fault.get("exception")))
        code = int(code) or (70 if faults else 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


if __name__ == "__main__":
    become()
