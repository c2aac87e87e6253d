"""What stands behind a row that was sent: its picture, or its tokens as they are read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from layercast.client.drawing.colours import Colours
from layercast.client.pictures import PictureSpec
from layercast.proto.codec import AnyArray


@dataclass(frozen=True, slots=True)
class Token:
    """One token to be shown, or the bytes of one character: positions `start` to before `stop`."""

    text: str
    start: int
    stop: int


def spec_of(preprocessing: Mapping[str, Any] | None) -> PictureSpec | None:
    """How pictures were prepared for the model, if it takes pictures."""
    return PictureSpec.parse(preprocessing) if preprocessing and preprocessing.get("kind") == "image" else None


def as_map(row: AnyArray, spec: PictureSpec | None) -> AnyArray:
    """A row of a model that takes flat pictures as [channels, height, width]; any other row as it is."""
    if spec is not None and row.ndim == 1 and row.size % (spec.height * spec.width) == 0:
        return row.reshape(-1, spec.height, spec.width)
    return row


def picture_of(row: AnyArray, spec: PictureSpec | None) -> Colours | None:
    """The row as a picture, [height, width, 3]; None for what is none."""
    planes = as_map(row, spec)
    if planes.ndim != 3 or planes.shape[0] not in (1, 3) or planes.dtype.kind not in "fu":
        return None
    levels = planes.astype(np.float64)
    if spec is not None:
        levels = levels / spec.scale
    else:
        low, high = levels.min(initial=0), levels.max(initial=0)
        levels = (levels - low) * (255 / (high - low) if high > low else 0)
    colours = np.broadcast_to(levels.clip(0, 255).round().astype(np.uint8), (3, *planes.shape[1:]))
    return np.ascontiguousarray(colours.transpose(1, 2, 0))


def tokens_of(row: AnyArray, preprocessing: Mapping[str, Any] | None) -> list[Token] | None:
    """The tokens of a row of whole numbers without the padding at its end; None for other rows.

    Bytes of a text are shown as its characters, one token for the bytes of each.
    """
    if row.ndim != 1 or row.dtype.kind not in "iu":
        return None
    ids = [int(number) for number in row]
    preprocessing = preprocessing or {}
    while len(ids) > 1 and "pad" in preprocessing and ids[-1] == preprocessing["pad"]:
        ids.pop()
    if preprocessing.get("kind") == "text" and preprocessing.get("encoding") == "utf-8":
        return _characters(ids)
    return [Token(str(number), place, place + 1) for place, number in enumerate(ids)]


def _characters(ids: Sequence[int]) -> list[Token]:
    tokens = []
    place = 0
    while place < len(ids):
        stop = place + _length(ids[place])
        try:
            text = bytes(ids[place:stop]).decode()
        except ValueError:  # cut off in the middle, or no byte at all
            stop = place + 1
            text = f"\\x{ids[place]:02x}"
        tokens.append(Token(text if text.isprintable() else repr(text)[1:-1], place, stop))
        place = stop
    return tokens


def _length(first: int) -> int:
    """How many bytes a character of UTF-8 has that begins with this one."""
    return 4 if first >= 0xF0 else 3 if first >= 0xE0 else 2 if first >= 0xC0 else 1
