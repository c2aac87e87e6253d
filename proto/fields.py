"""Fields of protobuf messages as bytes: what two serialised halves of a message have in common is put in between."""

from typing import Final

from google.protobuf.message import Message

_LENGTH_DELIMITED: Final = 2


def varint(number: int) -> bytes:
    """Return a number, 0 or greater, as protobuf writes it: seven bits a byte, the lowest first."""
    parts = bytearray()
    while number > 127:
        parts.append(number & 127 | 128)
        number >>= 7
    parts.append(number)
    return bytes(parts)


def mark(message: type[Message], field: str, size: int) -> bytes:
    """Return what stands before a value of `size` bytes of a field that holds texts, bytes or messages."""
    number = message.DESCRIPTOR.fields_by_name[field].number
    return varint(number << 3 | _LENGTH_DELIMITED) + varint(size)
