"""What Envoy loads: starts the server on the event loop that Envoy has for Python, and hands it the requests."""

import asyncio
import logging
import os
import sys
from typing import Final, NoReturn

from layercast.server import compiled, logs
from layercast.server.errors import StartError
from layercast.server.lifecycle import run
from layercast.server.settings import Settings, read
from layercast.server.transport.envoy.context import Event, Receive, Send
from layercast.server.transport.envoy.front_end import answering, applications
from layercast.server.transport.envoy.process import carried_here

_GIVEN: Final = carried_here()
_SETTINGS: Final = read(_GIVEN)
logs.configure(_SETTINGS.log_format)
compiled.look_in(_SETTINGS.compiled)  # for kernels: the sources run


async def entry(scope: Event, receive: Receive, send: Send) -> None:
    """Answer a request, or the question whether Envoy may open its ports: an ASGI application."""
    if scope["type"] == "http":
        await applications[scope["server"][1]](scope, receive, send)
        return
    await receive()
    serving = asyncio.create_task(_serve(_SETTINGS))
    await answering.wait()
    await send({"type": "lifespan.startup.complete"})
    await serving


async def _serve(settings: Settings) -> NoReturn:
    """Serve until the end, which is the process's too: nobody waits for what this would raise."""
    try:
        await run(settings)
    except StartError as error:
        print(f"layercast serve: {error}", file=sys.stderr, flush=True)
    except BaseException:
        logging.getLogger(__name__).exception("the server ended")
    os._exit(1)
