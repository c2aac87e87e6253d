"""Request bodies: read with a limit, inflated with a limit. Nothing larger than the limit is ever held."""

import asyncio

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

from layercast.server.transport.inflate import WINDOW_BITS, Broken, TooLarge, inflate


async def read_body(request: Request, limit: int) -> bytes | bytearray:
    """Return the body, inflated when it came compressed.

    Raises HTTPException: 413 when it has more than `limit` bytes, before or after inflation; 415 for a compression
    other than gzip and deflate; 400 when it does not inflate. Raises ClientDisconnect when the caller leaves.
    """
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in (*WINDOW_BITS, "identity", ""):
        raise HTTPException(415, f"content-encoding {encoding[:64]!r} is not supported; use gzip, deflate or none")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limit:
        raise _too_large(limit)
    body = bytearray()
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        body += message.get("body", b"")
        if len(body) > limit:
            raise _too_large(limit)
        if not message.get("more_body"):
            break
    if encoding in WINDOW_BITS and body:
        return await asyncio.to_thread(_inflated, body, encoding, limit)
    return body


def _inflated(body: bytearray, encoding: str, limit: int) -> bytearray:
    try:
        return inflate(body, encoding, limit)
    except TooLarge as error:
        raise _too_large(limit) from error
    except Broken as error:
        raise HTTPException(400, f"the body does not inflate as its content-encoding says: {error}") from error


def _too_large(limit: int) -> HTTPException:
    return HTTPException(
        413, f"the body has more than {limit} bytes; send fewer rows at a time, or raise the server's --max-message-mb"
    )
