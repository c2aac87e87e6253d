"""Decompression with a bound, for every front end: a bomb costs no more than the limit."""

import zlib
from typing import Final

WINDOW_BITS: Final = {"gzip": 31, "x-gzip": 31, "deflate": 15}
"""What zlib wants to know of each compression that is understood, by its name in headers."""
_PIECE: Final = 1 << 20


class TooLarge(Exception):
    """More comes out than the limit allows."""


class Broken(Exception):
    """The bytes are not what they are said to be; the text says how."""


def inflate(body: bytes | bytearray, encoding: str, limit: int) -> bytearray:
    """Return `body`, compressed as `encoding` (a key of WINDOW_BITS), inflated; gzip may have several members.

    Raises TooLarge beyond `limit` bytes, Broken for what doesn't inflate.
    """
    whole = bytearray()
    rest: bytes | bytearray = body
    try:
        while rest:
            inflater = zlib.decompressobj(WINDOW_BITS[encoding])
            while not inflater.eof:
                piece = inflater.decompress(rest, _PIECE)
                whole += piece
                if len(whole) > limit:
                    raise TooLarge
                rest = inflater.unconsumed_tail
                if not piece and not rest and not inflater.eof:
                    raise Broken("it is cut off")
            rest = inflater.unused_data
    except zlib.error as error:
        raise Broken(str(error)) from error
    return whole
