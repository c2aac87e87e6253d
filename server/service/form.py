"""What plain requests of the same sizes have in common: how to view their bytes, and how to answer them."""

import struct
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import numpy as np

from layercast.models.manifest import TensorSpec
from layercast.proto.codec import DATATYPES
from layercast.server.model import Group
from layercast.server.monitor import Kind
from layercast.server.service.requests import Wanted
from layercast.server.service.template import Template
from layercast.server.work import Array

Shape = tuple[int, ...]
Check = Callable[[bytes], bool]

_largest = np.maximum.reduce
_FORMATS: Final = {2: ("<e", "<H"), 4: ("<f", "<I"), 8: ("<d", "<Q")}


class View(NamedTuple):
    """One input: its bytes are an array of this kind if `check` finds nothing outside the input's range."""

    name: str
    dtype: np.dtype[np.generic]
    shape: Shape
    check: Check | None


class Form:
    """Requests whose inputs have these shapes, and that ask for the same. `group` says who shares a forward with them.

    `length` is the size of the dimension that is padded when lengths differ, 0 where there is none. `taps` are the
    layers that they ask for, `predict` tells whether they ask for outputs too.
    """

    __slots__ = ("group", "kind", "length", "predict", "rows", "sizes", "taps", "template", "views")

    def __init__(
        self, views: Sequence[View], sizes: tuple[int, ...], length: int, wanted: Wanted, template: Template
    ) -> None:
        self.views = views
        self.sizes = sizes
        self.rows = views[0].shape[0]
        self.length = length
        self.taps = wanted.taps
        self.predict = bool(wanted.outputs)
        self.kind: Kind = "features" if self.taps else "predict"
        self.template = template
        self.group: Group | None = None

    def inputs(self, contents: Sequence[bytes]) -> dict[str, Array] | None:
        """Return views of the inputs' bytes, which have the right sizes; None when a value is outside its range."""
        found: dict[str, Array] = {}
        for (name, dtype, shape, check), content in zip(self.views, contents, strict=True):
            if check and not check(content):
                return None
            found[name] = np.frombuffer(content, dtype).reshape(shape)
        return found

    def together(self, many: Sequence[Sequence[bytes]]) -> dict[str, Array] | None:
        """Return the rows of several requests one after the other; None when a value is outside its range."""
        found: dict[str, Array] = {}
        for at, (name, dtype, shape, check) in enumerate(self.views):
            content = b"".join([contents[at] for contents in many])
            if check and not check(content):
                return None
            found[name] = np.frombuffer(content, dtype).reshape(len(many) * shape[0], *shape[1:])
        return found


def check_of(spec: TensorSpec) -> Check | None:
    """Return what tells whether all values in an input's bytes are within its range; None when it has no range."""
    if spec.range is None:
        return None
    dtype, (low, high) = DATATYPES[spec.datatype], spec.range

    def within(content: bytes) -> bool:
        array = np.frombuffer(content, dtype)
        # Written so that NaN, which compares to nothing, counts as outside.
        return bool(array.min() >= low and array.max() <= high)

    most = _most_unsigned(dtype, low, high)
    if most is None:
        return within
    unsigned = np.dtype(f"<u{dtype.itemsize}")

    def quickly(content: bytes) -> bool:
        return bool(_largest(np.frombuffer(content, unsigned)) <= most) or within(content)

    return quickly


def _most_unsigned(dtype: np.dtype[np.generic], low: float, high: float) -> int | None:
    """Return the whole number whose bits are the highest value's, None where that says nothing of the others.

    Read as whole numbers without a sign, values from 0 on keep their order, floats too; what is below 0, and NaN, is
    more than any of them. So one look at the bits does for both ends of a range that begins at 0.
    """
    if low != 0 or high < 0:
        return None
    if dtype.kind in "iu":
        return int(high) if high < 2 ** (8 * dtype.itemsize - 1) and high < 2**53 else None
    if dtype.kind != "f":
        return None
    as_float, as_whole = _FORMATS[dtype.itemsize]
    try:
        bits = struct.pack(as_float, high + 0.0)  # not -0.0, whose bits are those of a large number
    except OverflowError:
        return None
    exact = struct.unpack(as_float, bits)[0] == high
    return int(struct.unpack(as_whole, bits)[0]) if exact else None
