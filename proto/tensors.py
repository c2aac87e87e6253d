"""One tensor: numpy array to wire bytes and back. Messages with several tensors are the business of `codec.py`.

Bytes are little-endian, row-major and dense. Shape, datatype and bytes are treated as hostile: sizes are compared in
Python integers, which do not wrap, and nothing is allocated before they agree.
"""

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

AnyArray = NDArray[Any]

# BF16 is not here because numpy has no such type: it travels as two bytes and is float32 in memory.
DATATYPES: dict[str, np.dtype[np.generic]] = {
    "BOOL": np.dtype("bool"),
    "UINT8": np.dtype("u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    "BYTES": np.dtype("O"),
}
BFLOAT16 = "BF16"
MAX_RANK = 8
MAX_DIMENSION = 2**31 - 1
# A BYTES element costs its sender 4 bytes and us a Python object.
MAX_BYTES_ELEMENTS = 1_000_000

_LENGTH = struct.Struct("<I")
# numpy multiplies the non-zero dimensions of an empty array too, in 63 bits of bytes.
_MAX_EXTENT = 2**62
_WIDEST = 8


class CodecError(ValueError):
    """The message is malformed; the sender is at fault. `field` says where, for example `inputs[0].shape`."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor stands in its message: `Place("input 'x'", "inputs[0]", "raw_input_contents[0]")`."""

    label: str = "tensor"
    tensor: str = ""
    data: str = "data"

    @property
    def shape(self) -> str:
        """Name of the field that holds the shape."""
        return f"{self.tensor}.shape".lstrip(".")

    @property
    def datatype(self) -> str:
        """Name of the field that holds the datatype."""
        return f"{self.tensor}.datatype".lstrip(".")

    def error(self, field: str, text: str) -> CodecError:
        """An error about this tensor."""
        return CodecError(field, f"{self.label}: {text}")


ANYWHERE = Place()


def quoted(text: str) -> str:
    """Text of a stranger made fit for a message or a log: escaped and cut."""
    return repr(text if len(text) <= 64 else text[:61] + "...")


def datatype_of(dtype: np.dtype[np.generic]) -> str:
    """Name on the wire of a numpy dtype. Raises CodecError for one that the protocol has no name for."""
    if dtype.kind in "SUO":
        return "BYTES"
    for name, known in DATATYPES.items():
        if known == dtype.newbyteorder("<"):
            return name
    raise CodecError("datatype", f"numpy {dtype} has no datatype in the protocol; convert to one of {_known()}")


def memory_dtype(datatype: str, place: Place = ANYWHERE) -> np.dtype[np.generic]:
    """The dtype of arrays that hold `datatype`. Raises CodecError when the name is unknown."""
    if datatype == BFLOAT16:
        return DATATYPES["FP32"]
    if datatype not in DATATYPES:
        raise place.error(place.datatype, f"datatype {quoted(datatype)} is unknown; use one of {_known()}")
    return DATATYPES[datatype]


def element_count(shape: Sequence[int], place: Place = ANYWHERE) -> int:
    """Number of elements of `shape`. Raises CodecError when no tensor can have that shape."""
    if len(shape) > MAX_RANK:
        raise place.error(place.shape, f"shape has {len(shape)} dimensions; at most {MAX_RANK} are allowed")
    for size in shape:
        if size < 0:
            hint = "send the actual size; -1 stands for any size only in metadata"
            raise place.error(place.shape, f"shape {list(shape)} has the negative dimension {size}; {hint}")
        if size > MAX_DIMENSION:
            raise place.error(place.shape, f"dimension {size} in shape {list(shape)} exceeds {MAX_DIMENSION}")
    if math.prod(max(size, 1) for size in shape) * _WIDEST > _MAX_EXTENT:
        raise place.error(place.shape, f"shape {list(shape)} is too large for any tensor")
    return math.prod(shape)


def from_bytes(raw: bytes, datatype: str, shape: Sequence[int], place: Place = ANYWHERE) -> AnyArray:
    """Decode one tensor. BF16 becomes float32 (exact), BYTES an object array of bytes; the rest are views, not copies.

    The result is read-only. Raises CodecError unless `raw` holds exactly the elements of `shape`.
    """
    dtype = memory_dtype(datatype, place)
    count = element_count(shape, place)
    if datatype == "BYTES":
        elements = _split(raw, count, place)
    else:
        stored = np.dtype("<u2") if datatype == BFLOAT16 else dtype
        if len(raw) != count * stored.itemsize:
            wanted = f"{datatype} of shape {list(shape)} takes {count * stored.itemsize} bytes"
            hint = "send the elements row-major, little-endian, without padding"
            raise place.error(place.data, f"{wanted}, got {len(raw)}; {hint}")
        elements = _numbers(raw, datatype, stored, place)
    elements.flags.writeable = False
    return elements.reshape(tuple(shape))


def tensor_bytes(array: AnyArray, datatype: str) -> bytes:
    """Encode the logical array, whatever its strides or byte order, row-major.

    Nothing is converted but float32 to BF16 (rounding to nearest, ties to even) and str to UTF-8 bytes: an array whose
    dtype does not belong to `datatype` raises CodecError.
    """
    if datatype == "BYTES":
        return b"".join(_LENGTH.pack(len(content)) + content for content in bytes_elements(array))
    values = little_endian(array, datatype)
    return _bfloat16(values).tobytes() if datatype == BFLOAT16 else values.tobytes()


def little_endian(array: AnyArray, datatype: str) -> AnyArray:
    """The array in wire byte order. Raises CodecError when its dtype does not belong to `datatype`."""
    wanted = memory_dtype(datatype)
    if array.dtype.newbyteorder("<") != wanted:
        rule = f"{datatype} is encoded from {wanted.name} arrays"
        raise CodecError("data", f"{rule}, got {array.dtype}; convert it first with .astype({wanted.name!r})")
    return array.astype(wanted, copy=False)


def bytes_elements(array: AnyArray) -> list[bytes]:
    """Elements of a BYTES tensor, row-major; text as UTF-8."""
    elements = array.ravel().tolist()
    for index, element in enumerate(elements):
        if isinstance(element, str):
            try:
                elements[index] = element.encode()
            except UnicodeEncodeError as error:
                raise CodecError("data", f"BYTES element {index} is text without a UTF-8 form: {error}") from error
        elif not isinstance(element, bytes):
            raise CodecError("data", f"BYTES elements are bytes or str, got {type(element).__name__}")
    return elements


def _known() -> str:
    return ", ".join([*DATATYPES, BFLOAT16])


def _numbers(raw: bytes, datatype: str, stored: np.dtype[np.generic], place: Place) -> AnyArray:
    values = np.frombuffer(raw, stored) if raw else np.empty(0, stored)
    if datatype == BFLOAT16:
        # A bfloat16 is the upper half of a float32.
        return (values.astype("<u4") << np.uint32(16)).view("<f4")
    if datatype == "BOOL" and values.size and values.view("u1").max() > 1:
        raise place.error(place.data, f"BOOL elements are bytes of value 0 or 1; got {values.view('u1').max()}")
    return values


def _bfloat16(values: AnyArray) -> AnyArray:
    """Upper halves of float32 bit patterns, rounded to nearest even; a NaN keeps the upper bits of its payload."""
    bits = np.ascontiguousarray(values, "<f4").view("<u4").reshape(-1)
    upper = bits >> np.uint32(16)
    rounded = (bits + np.uint32(0x7FFF) + (upper & np.uint32(1))) >> np.uint32(16)
    # Rounding would carry a NaN into infinity or zero. When its upper half alone reads as infinity, set the quiet bit.
    is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    quiet = np.where(upper & np.uint32(0x7F), upper, upper | np.uint32(0x40))
    return np.where(is_nan, quiet, rounded).astype("<u2")


def _split(raw: bytes, count: int, place: Place) -> AnyArray:
    """Take length-prefixed elements apart. The framing is walked to its end before the first object is made."""
    if count > MAX_BYTES_ELEMENTS:
        raise place.error(place.data, f"{count} BYTES elements; at most {MAX_BYTES_ELEMENTS} are allowed")
    _check_framing(raw, count, place)
    elements = np.empty(count, object)
    position = 0
    for index in range(count):
        start = position + _LENGTH.size
        position = start + _LENGTH.unpack_from(raw, position)[0]
        elements[index] = raw[start:position]
    return elements


def _check_framing(raw: bytes, count: int, place: Place) -> None:
    rule = "each element is a 4-byte little-endian length and then that many bytes"
    size = len(raw)
    position = 0
    for index in range(count):
        start = position + _LENGTH.size
        if start > size:
            raise place.error(place.data, f"{count} BYTES elements wanted, the data ends after {index}; {rule}")
        position = start + _LENGTH.unpack_from(raw, position)[0]
        if position > size:
            over = f"BYTES element {index} claims {position - start} bytes, {size - start} are left"
            raise place.error(place.data, f"{over}; {rule}")
    if position != size:
        raise place.error(place.data, f"{size - position} bytes follow the last of {count} BYTES elements; {rule}")
