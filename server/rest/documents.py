"""JSON in, JSON out, with bounds on what a document may cost in memory and in time on the event loop."""

import json
import math
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import Any, Final

import numpy as np

from layercast.proto.codec import DATATYPES, AnyArray, Place
from layercast.proto.tensors import element_count, memory_dtype, quoted
from layercast.server.errors import InvalidArgument

SMALL: Final = 64 << 10
"""A document up to this many bytes is parsed where it arrives; a larger one in a thread."""

# A JSON value costs its sender two bytes and us up to forty, an empty list three and sixty.
MAX_VALUES: Final = 4_000_000
MAX_CONTAINERS: Final = 1_000_000
_PIECE: Final = 1 << 16

# The plain decoder holds the interpreter's lock from one end of a document to the other. Functions of Python for the
# numbers let other threads run in between: the whole is slower, but the event loop goes on.
_YIELDING = json.JSONDecoder(
    parse_int=lambda digits: int(digits),  # noqa: PLW0108
    parse_float=lambda digits: float(digits),  # noqa: PLW0108
)


def parse(raw: bytes | bytearray | memoryview) -> Any:
    """Return the JSON document; InvalidArgument says where it is wrong, or over a limit."""
    try:
        text = str(raw, "utf-8")
    except UnicodeDecodeError as error:
        raise InvalidArgument(f"the body is not UTF-8 at byte {error.start}; JSON has to be") from error
    values, containers = text.count(",") + 1, text.count("[") + text.count("{")
    if values > MAX_VALUES or containers > MAX_CONTAINERS:
        raise InvalidArgument(
            f"the JSON has {values} values and {containers} lists and objects, at most {MAX_VALUES} and "
            f"{MAX_CONTAINERS} may be; send tensors as binary data"
        )
    try:
        return _YIELDING.decode(text) if len(text) > SMALL else json.loads(text)
    except RecursionError as error:
        raise InvalidArgument("the JSON is nested too deeply") from error
    except ValueError as error:
        raise InvalidArgument(f"the body is not JSON: {error}") from error


def array_from(data: Any, datatype: str, shape: list[int], place: Place) -> AnyArray:
    """Return a tensor's `data`, nested like `shape` or flat, as an array; CodecError says which element is wrong.

    Integers keep all their 64 bits. Floats may be written as integers, and as NaN, Infinity and -Infinity.
    """
    dtype, count = memory_dtype(datatype, place), element_count(shape, place)
    if datatype in ("FP16", "BF16"):
        raise place.error(place.data, f"{datatype} has no form in JSON; send it as binary data")
    if not isinstance(data, list):
        raise place.error(place.data, f"want a list of values, got {_kind(data)}")
    nested = len(shape) > 1 and bool(data) and isinstance(data[0], list)
    runs = _runs(data, shape, place) if nested else [data]
    parts, found = [], 0
    values = chain.from_iterable(runs)
    while piece := list(islice(values, _PIECE)):
        parts.append(_converted(piece, datatype, dtype, found, place))
        found += len(piece)
    if found != count:
        raise place.error(place.data, f"shape {shape} takes {count} elements, data has {found}")
    return (np.concatenate(parts) if parts else np.empty(0, dtype)).reshape(shape)


def _runs(node: Any, shape: list[int], place: Place) -> Iterator[list[Any]]:
    """Yield the innermost lists of `node`, which must be nested exactly like `shape`."""
    if not isinstance(node, list) or len(node) != shape[0]:
        got = f"a list of {len(node)}" if isinstance(node, list) else _kind(node)
        raise place.error(place.data, f"nested unlike its shape: want a list of {shape[0]} there, got {got}")
    if len(shape) == 1:
        yield node
    else:
        for child in node:
            yield from _runs(child, shape[1:], place)


_KINDS: Final[dict[str, tuple[type, ...]]] = {"b": (bool,), "i": (int,), "u": (int,), "f": (int, float), "O": (str,)}
_WORDS: Final = {"b": "true or false", "i": "a whole number", "u": "a whole number", "f": "a number", "O": "a string"}


def _converted(piece: list[Any], datatype: str, dtype: np.dtype[Any], start: int, place: Place) -> AnyArray:
    allowed = _KINDS[dtype.kind]
    if not set(map(type, piece)) <= set(allowed):
        at = next(index for index, value in enumerate(piece) if type(value) not in allowed)
        rule = f"want {_WORDS[dtype.kind]} for {datatype}, got {_kind(piece[at])}"
        raise place.error(place.data, f"element {start + at}: {rule}")
    try:
        if dtype.kind != "f":
            return np.array(piece, dtype)
        exact = np.array(piece, "f8")
    except OverflowError as error:
        raise place.error(place.data, f"a value does not fit into {datatype}: {error}") from error
    with np.errstate(over="ignore"):
        values = exact.astype(dtype)
    if np.any(lost := np.isinf(values) & np.isfinite(exact)):
        raise place.error(place.data, f"{exact[lost][0]:g} does not fit into {datatype}")
    return values


def _kind(value: Any) -> str:
    names = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "a string",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), "null")


def listed(array: AnyArray, datatype: str, name: str) -> Iterator[bytes]:
    """Yield a tensor as a flat JSON list, in pieces. NaN and the infinities, which JSON has not, become null.

    Raises InvalidArgument for a tensor that JSON can't carry.
    """
    flat = array.reshape(-1)
    yield b"["
    for start in range(0, flat.size, _PIECE):
        piece = flat[start : start + _PIECE]
        values: list[Any] = _texts(piece, name) if datatype == "BYTES" else piece.tolist()
        if piece.dtype.kind == "f" and not np.isfinite(piece).all():
            values = [value if math.isfinite(value) else None for value in values]
        yield (b"," if start else b"") + dumped(values)[1:-1]
    yield b"]"


def _texts(elements: Iterable[bytes], name: str) -> list[str]:
    try:
        return [element.decode() for element in elements]
    except UnicodeDecodeError as error:
        raise InvalidArgument(
            f"output {quoted(name)} has bytes that are not UTF-8 text, which JSON can't carry; ask for binary_data",
            field="outputs",
        ) from error


def has_json_form(datatype: str) -> bool:
    """Return whether JSON may carry the datatype."""
    return datatype in DATATYPES and datatype != "FP16"


def dumped(value: Any) -> bytes:
    """Return `value` as compact JSON; a float that JSON has not is a bug and raises ValueError."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False, ensure_ascii=False).encode()
