"""Values of layers as pictures: a panel for each layer and row."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from layercast.client.drawing import canvas
from layercast.client.drawing.canvas import FAINT, SMALL
from layercast.client.drawing.colours import Scale
from layercast.client.drawing.rows import Token, picture_of, spec_of, tokens_of
from layercast.client.drawing.values import matrix, vector
from layercast.proto.codec import AnyArray

if TYPE_CHECKING:
    from PIL.Image import Image

_PAGE = 1600
_INPUT = 96
# How large a map is drawn, by how many there are at most beside it.
_MAP_SIZES = ((1, 256), (4, 160), (16, 96), (math.inf, 64))


def figure(
    batch: AnyArray, layers: Mapping[str, AnyArray], names: Sequence[str], preprocessing: Mapping[str, Any] | None
) -> "Image":
    """A title for each layer, and below it a panel for each row of the batch.

    `layers` are arrays by name, the batch first: [N, C, H, W] becomes a grid of maps, each from its lowest to its
    highest value; [N, F] bars or a strip; [N, T, D] a matrix with a line for each token; [N, heads, T, T] of a model of
    tokens matrices with the tokens along both axes, the one that attends down and what it attends to across.
    """
    tokens = [tokens_of(row, preprocessing) for row in batch]
    spec = spec_of(preprocessing)
    pictures = [picture_of(row, spec) for row in batch]
    parts = []
    for name, values in layers.items():
        panels = []
        for row, shown, read, title in zip(values, pictures, tokens, names, strict=True):
            panel = [canvas.label(title, SMALL, FAINT), body(row, read, batch.shape[1:])]
            if shown is not None and row.ndim == 3:
                size = canvas.fitted(shown.shape[0], shown.shape[1], _INPUT)
                panel[1] = canvas.flowing([canvas.from_colours(shown, *size), panel[1]], _PAGE)
            panels.append(canvas.stacked(panel, 4))
        shape = ", ".join(map(str, values.shape[1:]))
        heading = canvas.label(f"{name}  [{shape}]")
        parts.append(canvas.stacked([heading, canvas.flowing(panels, _PAGE, 2 * canvas.GAP)], 6))
    return canvas.framed(canvas.stacked(parts, 2 * canvas.GAP))


def body(row: AnyArray, tokens: Sequence[Token] | None, sent: Sequence[int]) -> "Image":
    """One row's values of one layer, drawn by their shape; `sent` is that of the row that was sent."""
    if row.dtype.kind not in "biuf" or row.size == 0 or row.ndim > 3:
        return canvas.label(f"not drawn: {row.ndim} dimensions of {row.dtype}", SMALL, FAINT)
    if row.ndim < 2:
        return vector(row)
    if row.ndim == 2:
        return _by_token(row, tokens) if tokens and row.shape[:1] == sent else matrix(row)
    if tokens and row.shape[1:] == (*sent, *sent):
        return _attention(row, tokens)
    return _maps(row)


def _by_token(row: AnyArray, tokens: Sequence[Token]) -> "Image":
    return matrix(row[: tokens[-1].stop], down=_texts(tokens))


def _attention(heads: AnyArray, tokens: Sequence[Token]) -> "Image":
    """A matrix for each head, all with one scale."""
    length = tokens[-1].stop
    cut = heads[:, :length, :length]
    scale = Scale(cut)
    texts = _texts(tokens)
    panels = [
        canvas.stacked([canvas.label(f"head {number}", SMALL, FAINT), matrix(head, texts, texts, scale)], 4)
        for number, head in enumerate(cut)
    ]
    return canvas.flowing(panels, _PAGE)


def _texts(tokens: Sequence[Token]) -> list[str]:
    """A text for each position; a character of several bytes stands at its first."""
    return [token.text if place == token.start else "" for token in tokens for place in range(token.start, token.stop)]


def _maps(row: AnyArray) -> "Image":
    """A grid of channels from left to right, the number of each line's first beside it."""
    channels, height, width = row.shape
    size = canvas.fitted(height, width, next(size for most, size in _MAP_SIZES if channels <= most))
    columns = channels if channels <= 4 else math.ceil(math.sqrt(channels))
    lines = []
    for first in range(0, channels, columns):
        maps = [
            canvas.from_colours(Scale(channel, stretched=True).colours(channel), *size)
            for channel in row[first : first + columns]
        ]
        number = canvas.blank(math.ceil(canvas.text_width(str(channels), SMALL)) + 4, size[1])
        canvas.write(number, (number.width / 2, size[1] / 2), str(first), SMALL, FAINT)
        lines.append(canvas.beside([number, *maps], 3))
    if channels > 1:
        return canvas.stacked(lines, 3)
    return canvas.stacked([*lines, canvas.scale_bar(Scale(row, stretched=True))], 4)
