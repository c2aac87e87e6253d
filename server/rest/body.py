"""Request bodies: read with a limit, inflated with a limit. Nothing larger than the limit is ever held."""

import asyncio
import zlib

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

_WINDOW_BITS = {"gzip": 31, "x-gzip": 31, "deflate": 15}
_PIECE = 1 << 20


async def read_body(request: Request, limit: int) -> bytes | bytearray:
    """Return the body, inflated when it came compressed.

    Raises HTTPException: 413 when it has more than `limit` bytes, before or after inflation; 415 for a compression
    other than gzip and deflate; 400 when it does not inflate. Raises ClientDisconnect when the caller leaves.
    """
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in (*_WINDOW_BITS, "identity", ""):
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
    if encoding in _WINDOW_BITS and body:
        return await asyncio.to_thread(_inflate, body, _WINDOW_BITS[encoding], limit)
    return body


def _inflate(body: bytearray, window_bits: int, limit: int) -> bytearray:
    """Inflate in pieces, so that a bomb costs no more than the limit; gzip may have several members."""
    whole = bytearray()
    rest: bytes | bytearray = body
    try:
        while rest:
            inflater = zlib.decompressobj(window_bits)
            while not inflater.eof:
                piece = inflater.decompress(rest, _PIECE)
                whole += piece
                if len(whole) > limit:
                    raise _too_large(limit)
                rest = inflater.unconsumed_tail
                if not piece and not rest and not inflater.eof:
                    raise HTTPException(400, "the compressed body is cut off")
            rest = inflater.unused_data
    except zlib.error as error:
        raise HTTPException(400, f"the body does not inflate as its content-encoding says: {error}") from error
    return whole


def _too_large(limit: int) -> HTTPException:
    return HTTPException(
        413, f"the body has more than {limit} bytes; send fewer rows at a time, or raise the server's --max-message-mb"
    )
