"""Values that are no picture: bars, strips, matrices, and tokens coloured by a value each."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from layercast.client.drawing import canvas
from layercast.client.drawing.canvas import FAINT, INK, SMALL, TEXT
from layercast.client.drawing.colours import DIVERGING, VIRIDIS, Scale
from layercast.client.drawing.rows import Token
from layercast.client.pictures import pillow
from layercast.proto.codec import AnyArray

if TYPE_CHECKING:
    from PIL.Image import Image

_WIDTH = 640
_BAR_HEIGHT = 140
_MOST_BARS = 128
_LINE = 64
_CELL, _SMALLEST_LABELLED, _MATRIX = 18, 10, 1440
_TEXT_WIDTH, _TOKEN_HEIGHT = 900, 26


def vector(values: AnyArray) -> "Image":
    """A row of numbers: bars about zero with their places below, or for many a folded strip of colours."""
    numbers = np.asarray(values, np.float64).reshape(-1)
    return _bars(numbers) if numbers.size <= _MOST_BARS else _strip(numbers)


def _bars(numbers: AnyArray) -> "Image":
    drawn = np.where(np.isfinite(numbers), numbers, 0)
    low, high = min(float(drawn.min(initial=0)), 0.0), max(float(drawn.max(initial=0)), 0.0)
    unit = (_BAR_HEIGHT - 1) / ((high - low) or 1)
    step = max(min(_WIDTH // max(len(drawn), 1), 28), 4)
    bars = canvas.blank(max(step * len(drawn), 1), _BAR_HEIGHT)
    zero = high * unit
    for place, value in enumerate(drawn):
        top, bottom = sorted((zero, zero - value * unit))
        colour = DIVERGING[0] if value < 0 else DIVERGING[-1] if low < 0 else VIRIDIS[3]
        canvas.rectangle(bars, (place * step + 1, top, (place + 1) * step - 2, bottom), colour)
    canvas.rectangle(bars, (0, zero, bars.width, zero), FAINT)
    texts = [canvas.label(f"{value:.3g}", SMALL, FAINT) for value in (high, low)]
    side = canvas.blank(max(text.width for text in texts), _BAR_HEIGHT)
    for text, top in zip(texts, (0, _BAR_HEIGHT - texts[1].height), strict=True):
        side.paste(text, (side.width - text.width, top))
    return canvas.stacked([canvas.beside([side, bars], 6), _places(len(drawn), step, side.width + 6)], 2)


def _places(count: int, step: int, indent: int) -> "Image":
    """Numbers below the bars, as many as there is room for."""
    widest = canvas.text_width(str(max(count - 1, 0)), SMALL) + 4
    every = next(number for number in (1, 2, 5, 10, 20, 50, 100) if number * step >= widest or number == 100)
    line = canvas.blank(indent + step * count + math.ceil(widest), SMALL + 4)
    for place in range(0, count, every):
        canvas.write(line, (indent + (place + 0.5) * step, SMALL / 2 + 2), str(place), SMALL, FAINT)
    return line


def _strip(numbers: AnyArray) -> "Image":
    lines = math.ceil(len(numbers) / _LINE)
    scale = Scale(numbers)
    cells = np.full((lines * _LINE, 3), 255, np.uint8)
    cells[: len(numbers)] = scale.colours(numbers)
    strip = canvas.from_colours(cells.reshape(lines, _LINE, 3), _LINE * 10, lines * 10)
    note = canvas.label(f"{_LINE} values a line, from left to right", SMALL, FAINT)
    return canvas.stacked([strip, canvas.beside([canvas.scale_bar(scale), note], 24)], 4)


def matrix(
    values: AnyArray, down: Sequence[str] | None = None, across: Sequence[str] | None = None, scale: Scale | None = None
) -> "Image":
    """A matrix of colours with texts along its axes, where there is room for them."""
    rows, columns = values.shape
    wide = _cell(columns, across)
    high = _cell(rows, down)
    if across is not None and down is not None:
        wide = high = min(wide, high)
    scale = scale or Scale(values)
    body = canvas.from_colours(
        scale.colours(values), min(columns * wide, max(columns, _MATRIX)), min(rows * high, max(rows, _MATRIX))
    )
    if across is not None and wide >= _SMALLEST_LABELLED:
        body = canvas.stacked([_across(across, wide), body], 2)
    if down is not None and high >= _SMALLEST_LABELLED:
        side = _down(down, high)
        image = canvas.blank(side.width + 4 + body.width, body.height)
        image.paste(side, (0, body.height - side.height))
        image.paste(body, (side.width + 4, 0))
        body = image
    return canvas.stacked([body, canvas.scale_bar(scale)], 4)


def _cell(count: int, labels: Sequence[str] | None) -> int:
    """Pixels for a value along one axis."""
    if labels is None:
        return max(min(_WIDTH // max(count, 1), _CELL), 1)
    if count * _SMALLEST_LABELLED <= _MATRIX:
        return max(min(_WIDTH // max(count, 1), _CELL), _SMALLEST_LABELLED)
    return max(_MATRIX // count, 1)


def _down(texts: Sequence[str], cell: int, to_the_right: bool = True) -> "Image":
    """A text for each line, all beginning or all ending at one edge."""
    size = min(cell, SMALL)
    width = math.ceil(max(canvas.text_width(_visible(text), size) for text in texts)) + 4
    side = canvas.blank(width, cell * len(texts))
    for place, text in enumerate(texts):
        own = _visible(text)
        half = canvas.text_width(own, size) / 2 + 2
        canvas.write(side, (width - half if to_the_right else half, (place + 0.5) * cell), own, size, INK)
    return side


def _across(texts: Sequence[str], cell: int) -> "Image":
    """Upright where each fits its column, else turned to be read upwards."""
    size = min(cell, SMALL)
    if max(canvas.text_width(_visible(text), size) for text in texts) > cell:
        return _turned(_down(texts, cell, to_the_right=False))
    top = canvas.blank(cell * len(texts), size + 4)
    for place, text in enumerate(texts):
        canvas.write(top, ((place + 0.5) * cell, size / 2 + 2), _visible(text), size, INK)
    return top


def _turned(image: "Image") -> "Image":
    """Turned by a quarter against the clock, so that what was the left edge is the lower one."""
    return image.transpose(pillow().Transpose.ROTATE_90)


def _visible(text: str) -> str:
    return "·" if text.isspace() else text


def coloured_text(tokens: Sequence[Token], values: Sequence[float], scale: Scale) -> "Image":
    """The tokens in lines, each on the colour of its value. Lines break at spaces where they can."""
    widths = [max(math.ceil(canvas.text_width(token.text, TEXT)) + 4, 9) for token in tokens]
    lines = _lines([token.text for token in tokens], widths)
    image = canvas.blank(
        max(sum(widths[place] for place in line) for line in lines), (_TOKEN_HEIGHT + 4) * len(lines) - 4
    )
    for number, line in enumerate(lines):
        left, top = 0, number * (_TOKEN_HEIGHT + 4)
        for place in line:
            background = scale.colours(np.array(values[place]))
            box = (left, top, left + widths[place] - 1, top + _TOKEN_HEIGHT - 1)
            canvas.rectangle(image, box, tuple(int(level) for level in background))
            dark = float(background @ [0.299, 0.587, 0.114]) < 110
            middle = left + widths[place] / 2, top + _TOKEN_HEIGHT / 2
            canvas.write(image, middle, tokens[place].text, TEXT, "white" if dark else INK)
            left += widths[place]
    return image


def _lines(texts: Sequence[str], widths: Sequence[int]) -> list[list[int]]:
    """Places of the tokens, line by line."""
    lines: list[list[int]] = [[]]
    used = 0
    for place, width in enumerate(widths):
        if lines[-1] and used + width > _TEXT_WIDTH:
            line = lines[-1]
            spaces = [index for index, each in enumerate(line) if texts[each].isspace()]
            cut = spaces[-1] + 1 if spaces and not texts[place].isspace() else len(line)
            lines[-1], carried = line[:cut], line[cut:]
            lines.append(carried)
            used = sum(widths[each] for each in carried)
        lines[-1].append(place)
        used += width
    return lines
