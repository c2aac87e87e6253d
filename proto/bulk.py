"""A look at a large message before it is parsed: what it would cost in objects.

Two bytes on the wire can become a whole message object, one byte a number of eight: 64 MiB then take gigabytes and
seconds, during which the parser, one call into C, lets nothing else run. Tensors sent as raw bytes, and floats, are
one field whatever their size.
"""

from typing import Any, Final

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from layercast.proto.tensors import CodecError

MAX_FIELDS: Final = 1 << 16
"""Fields of a message, those of the messages inside it included."""
MAX_VARINT_BYTES: Final = 4 << 20
"""Bytes of a message's whole-number and boolean lists together."""

_VARINTS: Final = frozenset(
    {
        FieldDescriptor.TYPE_BOOL,
        FieldDescriptor.TYPE_INT32,
        FieldDescriptor.TYPE_INT64,
        FieldDescriptor.TYPE_UINT32,
        FieldDescriptor.TYPE_UINT64,
        FieldDescriptor.TYPE_ENUM,
    }
)
_VARINT, _EIGHT, _DELIMITED, _FOUR = 0, 1, 2, 5
_LONGEST = 10


class MessageTooComplex(ValueError):
    """Parsing the message would take far more than its size suggests."""


def check_bulk(wire: bytes, message: type[Message]) -> None:
    """Raise MessageTooComplex when `wire`, a serialised `message`, has too many parts.

    Raises CodecError when it is no message at all. Takes at most a few dozen milliseconds, and next
    to nothing for a message that is mostly tensors.
    """
    pending: list[tuple[Any, int, int]] = [(message.DESCRIPTOR, 0, len(wire))]
    fields = varints = 0
    while pending:
        descriptor, at, end = pending.pop()
        while at < end:
            fields += 1
            tag, at = _number(wire, at, end)
            kind = tag & 7
            if kind == _DELIMITED:
                size, at = _number(wire, at, end)
                field = descriptor.fields_by_number.get(tag >> 3)
                if field is not None and field.message_type is not None:
                    pending.append((field.message_type, at, min(at + size, end)))
                elif field is not None and field.type in _VARINTS:
                    varints += size
                at += size
            elif kind == _VARINT:
                _, at = _number(wire, at, end)
            elif kind in (_EIGHT, _FOUR):
                at += 8 if kind == _EIGHT else 4
            else:
                raise CodecError("", f"wire type {kind}, which no message of this protocol has")
            if fields > MAX_FIELDS or varints > MAX_VARINT_BYTES:
                raise MessageTooComplex(
                    f"the message has more than {MAX_FIELDS:,} fields, or more than {MAX_VARINT_BYTES:,} bytes of "
                    "whole numbers in lists; send tensors as raw bytes"
                )
        if at > end:
            raise CodecError("", "a field reaches beyond the end of its message")


def _number(wire: bytes, at: int, end: int) -> tuple[int, int]:
    """Return the number at `at`, seven bits a byte, the lowest first, and where it ends."""
    value = 0
    for place in range(_LONGEST):
        if at >= end:
            break
        byte = wire[at]
        at += 1
        value |= (byte & 0x7F) << (7 * place)
        if byte < 0x80:
            return value, at
    raise CodecError("", "a number without an end")
