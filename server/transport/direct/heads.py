"""Headers of calls: what comes, decoded (HPACK, RFC 7541) and checked (RFC 9113, section 8), and what goes."""

import logging
import re
from collections.abc import Iterable
from typing import Final

import grpc
from hpack import Decoder, HPACKError, OversizedHeaderListError

from layercast.server.transport.direct.calm import Calm
from layercast.server.transport.direct.frames import Code, ConnectionFault
from layercast.server.transport.framing import status_headers
from layercast.server.transport.rpc_call import HEADERS, is_rpc

# At its DEBUG level it writes every header of every call, tokens too.
logging.getLogger("hpack").setLevel(logging.WARNING)

MAX_LIST: Final = 32 << 10
"""Bytes of a call's headers, counted as HTTP/2 does: names, values and 32 for each. A call with more is refused."""
# Beyond it, decoding stops in the middle, and what is said after it can't be read any more.
_BOMB: Final = 4 * MAX_LIST
_EACH: Final = 32
_TOO_MUCH: Final = (
    grpc.StatusCode.RESOURCE_EXHAUSTED.value[0],
    f"the headers take more than {MAX_LIST:,} bytes, names, values and {_EACH} for each counted; send fewer",
)
_MOST_KEPT: Final = 64
_LONGEST_KEPT: Final = 4096
_MANY: Final = 64
_PER_WASTED: Final = 8
"""Fields that cost as much as a frame that does nothing."""
NO_TABLE: Final = b"\x20"
"""What begins a block whose sender keeps no table from now on."""

_NAME: Final = re.compile(rb"[!#$%&'*+.^_`|~0-9a-z-]+")
_VALUE: Final = re.compile(rb"[^\x00\r\n]*")
_LENGTH: Final = re.compile(rb"[0-9]{1,18}")
_REQUIRED: Final = frozenset((b":method", b":scheme", b":path"))
_PSEUDO: Final = _REQUIRED | {b":authority"}
# They speak of a connection, which is HTTP/2's own business.
_OF_CONNECTIONS: Final = frozenset(
    (b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade")
)

Pairs = tuple[tuple[bytes, bytes], ...]


def header_block(pairs: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Return headers as literals that no table keeps: the same bytes whatever was said before."""
    return b"".join(b"\0" + _text(name) + _text(value) for name, value in pairs)


def _text(text: bytes) -> bytes:
    size = len(text)
    if size < 127:
        return bytes((size,)) + text
    prefix, size = bytearray((127,)), size - 127
    while size >= 128:
        prefix.append(size & 127 | 128)
        size >>= 7
    prefix.append(size)
    return bytes(prefix) + text


START: Final = b"\x88" + header_block(HEADERS)
"""The header block, with status 200, that begins every answer."""


class Head:
    """The headers of one call. Nobody changes it: calls with equal ones share it.

    `pairs` are those without a colon, `headers` the last of each name. `malformed` says that HTTP/2 forbids them as the
    beginning of a request, `is_trailers` that it allows them at its end; `refusal` is the header block that answers a
    request which is no call of gRPC, or one with too many headers. `length` is what the body is to have, -1 if that is
    not said.
    """

    __slots__ = ("headers", "is_trailers", "length", "malformed", "pairs", "path", "refusal")

    def __init__(self, fields: list[tuple[bytes, bytes]]) -> None:
        pseudo = [pair for pair in fields if pair[0][:1] == b":"]
        self.pairs: Pairs = tuple(pair for pair in fields if pair[0][:1] != b":")
        self.headers = dict(self.pairs)
        asked = dict(pseudo)
        plain = self._is_plain()
        self.is_trailers = plain and not pseudo
        in_order = fields[: len(pseudo)] == pseudo and len(asked) == len(pseudo)
        lengths = {value for name, value in self.pairs if name == b"content-length"}
        one_length = len(lengths) <= 1 and all(map(_LENGTH.fullmatch, lengths))
        self.length = int(lengths.pop()) if lengths and one_length else -1
        self.malformed = not (plain and one_length and in_order and _is_request(asked))
        self.path = asked.get(b":path", b"").decode("latin-1")
        self.refusal = self._refusal(asked, sum(len(name) + len(value) + _EACH for name, value in fields))

    def _is_plain(self) -> bool:
        """Tell whether the fields without a colon are such as HTTP/2 has."""
        return (
            self.headers.keys().isdisjoint(_OF_CONNECTIONS)
            and self.headers.get(b"te", b"trailers") == b"trailers"
            and all(_NAME.fullmatch(name) and _VALUE.fullmatch(value) for name, value in self.pairs)
        )

    def _refusal(self, asked: dict[bytes, bytes], size: int) -> bytes:
        if asked.get(b":method") != b"POST":
            return header_block(((b":status", b"405"),))
        if not is_rpc(self.headers.get(b"content-type", b"")):
            return header_block(((b":status", b"415"),))
        return START + header_block(status_headers(*_TOO_MUCH, ())) if size > MAX_LIST else b""


class Heads:
    """Decodes the header blocks of one connection.

    Calls of one client mostly have the same headers, in the same few bytes, since HPACK refers to a table. What such
    bytes meant is kept as long as the table stays as it is.
    """

    def __init__(self, calm: Calm) -> None:
        self._calm = calm
        self._decoder = Decoder(max_header_list_size=_BOMB)
        self._known: dict[bytes, Head] = {}

    def read(self, block: bytes) -> Head:
        """Return what `block` says; every block of a connection has to be read, in order."""
        return self._known.get(block) or self._decoded(block)

    def _decoded(self, block: bytes) -> Head:
        table = self._decoder.header_table.dynamic_entries
        before = table[0] if table else None, len(table)
        try:
            fields = [(bytes(name), bytes(value)) for name, value in self._decoder.decode(block, raw=True)]
        except OversizedHeaderListError as error:
            raise ConnectionFault(Code.ENHANCE_YOUR_CALM, f"headers of more than {MAX_LIST:,} bytes") from error
        except (HPACKError, IndexError, ValueError) as error:
            raise ConnectionFault(Code.COMPRESSION_ERROR, "a header block can't be decoded") from error
        # Some microseconds for each, of which a peer may ask for thousands with a byte each.
        if len(fields) > _MANY:
            self._calm.spend(len(fields) // _PER_WASTED)
        head = Head(fields)
        # What is put into the table comes first there, as a new object. How much may be put there can't be seen in it.
        changed = before != (table[0] if table else None, len(table)) or (table and table[0] is not before[0])
        if changed or _resizes(block):
            self._known.clear()
        elif len(self._known) < _MOST_KEPT and len(block) <= _LONGEST_KEPT:
            self._known[block] = head
        return head


def _is_request(asked: dict[bytes, bytes]) -> bool:
    return (
        _REQUIRED <= asked.keys() <= _PSEUDO
        and asked[b":path"].startswith((b"/", b"*"))
        and all(_VALUE.fullmatch(value) for value in asked.values())
    )


def _resizes(block: bytes) -> bool:
    """Tell whether the block changes how much the table may hold."""
    return block[:1] >= NO_TABLE and block[0] < 0x40
