"""Text and layout: pictures side by side, below each other, with titles and scales."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from layercast.client.drawing.colours import Colours, Scale, coloured
from layercast.client.errors import InputError
from layercast.client.files import replacing
from layercast.client.pictures import pillow
from layercast.proto.codec import AnyArray

if TYPE_CHECKING:
    from PIL.Image import Image

PAPER, INK, FAINT = "white", "#1a1a1a", "#767676"
GAP = 12
TEXT, SMALL = 15, 12
MOST_PIXELS = 64_000_000

# Pillow's own font has little beyond ASCII. Where one of these is installed it draws the rest.
_FALLBACKS = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "Arial.ttf", "Arial Unicode.ttf")


def label(text: str, size: int = TEXT, colour: str = INK) -> "Image":
    """The text on paper, with nothing cut off."""
    text, drawn = _drawable(text, size)
    left, top, right, bottom = drawn.getbbox(text or " ")
    # One height for all texts of a size, so that they stand on one line.
    ascent, descent = drawn.getmetrics()
    extent = int(np.ceil(max(right, 1) - min(left, 0))), max(ascent + descent, int(np.ceil(bottom - min(top, 0))))
    image: Image = pillow().new("RGB", extent, PAPER)
    _pen(image).text((-min(left, 0), -min(top, 0)), text, font=drawn, fill=colour)
    return image


def write(image: "Image", centre: tuple[float, float], text: str, size: int, colour: str) -> None:
    """Write the text about a point of the image."""
    text, drawn = _drawable(text, size)
    _pen(image).text(centre, text, font=drawn, fill=colour, anchor="mm")


def text_width(text: str, size: int) -> float:
    """Pixels that the text takes from left to right."""
    text, drawn = _drawable(text, size)
    width: float = drawn.getlength(text)
    return width


def rectangle(image: "Image", box: tuple[float, float, float, float], colour: Any) -> None:
    """Fill a box: left, top, right and bottom, the last two included."""
    _pen(image).rectangle(box, fill=colour)


def blank(width: int, height: int) -> "Image":
    """Empty paper. Raises InputError for more than fits a picture that anyone could look at."""
    if width * height > MOST_PIXELS:
        raise InputError(
            f"the picture would have {width:,} x {height:,} pixels, at most {MOST_PIXELS:,} are drawn: "
            "choose fewer rows or layers"
        )
    image: Image = pillow().new("RGB", (width, height), PAPER)
    return image


def sampled(values: AnyArray, width: int, height: int) -> NDArray[np.float64]:
    """The [height, width] values of a map that is enlarged or shrunk as `from_colours` does it."""
    image = pillow().fromarray(np.ascontiguousarray(values, np.float32))
    return np.asarray(_resized(image, width, height), np.float64)


def from_colours(colours: Colours, width: int, height: int) -> "Image":
    """An image of `width` by `height` pixels: each colour a block where it is enlarged, averaged where it shrinks."""
    return _resized(pillow().fromarray(np.ascontiguousarray(colours)), width, height)


def _resized(image: "Image", width: int, height: int) -> "Image":
    resampling = pillow().Resampling
    shrinks = width < image.width or height < image.height
    return image.resize((width, height), resampling.BOX if shrinks else resampling.NEAREST)


def fitted(height: int, width: int, target: int) -> tuple[int, int]:
    """Width and height of a map of [height, width] values drawn about `target` pixels large, whole pixels a value."""
    longest = max(height, width, 1)
    if longest > target:
        return max(round(width * target / longest), 1), max(round(height * target / longest), 1)
    factor = target // longest
    return width * factor, height * factor


def stacked(parts: Sequence["Image"], gap: int = GAP) -> "Image":
    """Below each other, left-aligned."""
    height = sum(part.height for part in parts) + gap * (len(parts) - 1)
    image = blank(max(part.width for part in parts), height)
    top = 0
    for part in parts:
        image.paste(part, (0, top))
        top += part.height + gap
    return image


def beside(parts: Sequence["Image"], gap: int = GAP) -> "Image":
    """Side by side, their middles on one line."""
    width = sum(part.width for part in parts) + gap * (len(parts) - 1)
    image = blank(width, max(part.height for part in parts))
    left = 0
    for part in parts:
        image.paste(part, (left, (image.height - part.height) // 2))
        left += part.width + gap
    return image


def flowing(parts: Sequence["Image"], width: int, gap: int = GAP) -> "Image":
    """From left to right in lines that are at most `width` wide, or as wide as the widest part."""
    lines: list[list[Image]] = []
    used = 0
    for part in parts:
        if lines and used + gap + part.width <= width:
            lines[-1].append(part)
            used += gap + part.width
        else:
            lines.append([part])
            used = part.width
    rows = []
    for line in lines:
        row = blank(sum(part.width for part in line) + gap * (len(line) - 1), max(part.height for part in line))
        left = 0
        for part in line:
            row.paste(part, (left, 0))
            left += part.width + gap
        rows.append(row)
    return stacked(rows, gap)


def scale_bar(scale: Scale) -> "Image":
    """The colours of a scale between its lowest and its highest value."""
    bar = from_colours(
        np.repeat(coloured(np.linspace(0, 1, 96), scale.anchors)[None], SMALL - 2, axis=0), 96, SMALL - 2
    )
    return beside([label(f"{scale.low:.3g}", SMALL, FAINT), bar, label(f"{scale.high:.3g}", SMALL, FAINT)], 6)


def framed(image: "Image", margin: int = GAP) -> "Image":
    """The picture with a margin of paper."""
    paper = blank(image.width + 2 * margin, image.height + 2 * margin)
    paper.paste(image, (margin, margin))
    return paper


def save(image: "Image", path: Path) -> None:
    """Write a picture in the format that the ending names."""
    kind = pillow().registered_extensions()[path.suffix.lower()]
    with replacing(path) as file:
        image.save(file, kind)


def _pen(image: "Image") -> Any:
    from PIL import ImageDraw

    return ImageDraw.Draw(image)


def _drawable(text: str, size: int) -> tuple[str, Any]:
    """The text and the font that has most of it; what that lacks is written as its escape."""
    drawn = max(_fonts(size), key=lambda font: sum(_has(font, character) for character in text))
    return "".join(c if _has(drawn, c) else c.encode("ascii", "backslashreplace").decode() for c in text), drawn


@lru_cache
def _fonts(size: int) -> tuple[Any, ...]:
    from PIL import ImageFont

    found: list[Any] = [ImageFont.load_default(size)]
    for name in _FALLBACKS:
        try:
            found.append(ImageFont.truetype(name, size))
        except OSError:
            continue
    return tuple(found)


@lru_cache(4096)
def _has(drawn: Any, character: str) -> bool:
    return character.isspace() or bytes(drawn.getmask(character)) != bytes(drawn.getmask("\uffff"))
