"""Pictures of a training: learning curves and the confusion matrix, drawn with Pillow."""

import math
from collections.abc import Callable, Sequence

from PIL import Image, ImageDraw, ImageFont

from layercast.models.training.loop import Epoch, best_epoch

_INK, _PALE, _GRID, _PAPER = "#111827", "#6b7280", "#e5e7eb", "#ffffff"
_BLUE, _ORANGE = (37, 99, 235), (234, 88, 12)
_ZOOM = 2
"""Everything is drawn this much larger and then shrunk, which smooths lines."""

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
Series = tuple[str, tuple[int, int, int], Sequence[float]]
"""A line of a chart: name, colour, one value an epoch."""


class _Canvas:
    """A drawing in units of the final picture's pixels."""

    def __init__(self, width: int, height: int) -> None:
        self.image = Image.new("RGB", (width * _ZOOM, height * _ZOOM), _PAPER)
        self._draw = ImageDraw.Draw(self.image)
        self._fonts: dict[int, Font] = {}

    def line(self, points: Sequence[tuple[float, float]], colour: str | tuple[int, int, int], width: float = 1) -> None:
        scaled = [(x * _ZOOM, y * _ZOOM) for x, y in points]
        self._draw.line(scaled, fill=colour, width=round(width * _ZOOM), joint="curve")

    def box(self, x: float, y: float, width: float, height: float, colour: tuple[int, int, int]) -> None:
        corners = (x * _ZOOM, y * _ZOOM, (x + width) * _ZOOM - 1, (y + height) * _ZOOM - 1)
        self._draw.rectangle(corners, fill=colour)

    def dot(self, x: float, y: float, colour: tuple[int, int, int], radius: float = 4) -> None:
        corners = tuple(value * _ZOOM for value in (x - radius, y - radius, x + radius, y + radius))
        self._draw.ellipse(corners, fill=colour, outline=_PAPER, width=_ZOOM)

    def text(self, x: float, y: float, text: str, anchor: str, size: int = 13, colour: str = _PALE) -> None:
        if size not in self._fonts:
            self._fonts[size] = ImageFont.load_default(size * _ZOOM)
        self._draw.text((x * _ZOOM, y * _ZOOM), text, fill=colour, font=self._fonts[size], anchor=anchor)

    def finished(self) -> Image.Image:
        width, height = self.image.size
        return self.image.resize((width // _ZOOM, height // _ZOOM), Image.Resampling.LANCZOS)


def curves(name: str, history: list[Epoch]) -> Image.Image:
    """Draw loss (training and validation) and validation accuracy by epoch, the best epoch marked."""
    canvas = _Canvas(1080, 400)
    best = best_epoch(history)
    losses: list[Series] = [
        ("training loss", _ORANGE, [epoch.loss for epoch in history]),
        ("validation loss", _BLUE, [epoch.validation_loss for epoch in history]),
    ]
    accuracy: list[Series] = [("validation accuracy", _BLUE, [epoch.validation_accuracy for epoch in history])]
    canvas.text(24, 26, f"{name}: {len(history)} epochs, best {best + 1}", "lm", 17, _INK)
    _chart(canvas, (70, 80, 430, 260), losses, best, lambda value: f"{value:.3g}")
    _chart(canvas, (600, 80, 430, 260), accuracy, best, lambda value: f"{value:.4g}")
    return canvas.finished()


def _chart(
    canvas: _Canvas, frame: tuple[int, int, int, int], series: list[Series], best: int, label: Callable[[float], str]
) -> None:
    left, top, width, height = frame
    epochs = len(series[0][2])
    values = [value for _, _, line in series for value in line]
    ticks = _ticks(min(values), max(values))
    low, high = ticks[0], ticks[-1]

    def place(epoch: float, value: float) -> tuple[float, float]:
        x = left + width * (epoch / max(1, epochs - 1))
        return x, top + height * (1 - (value - low) / (high - low))

    for tick in ticks:
        _, y = place(0, tick)
        canvas.line([(left, y), (left + width, y)], _GRID)
        canvas.text(left - 8, y, label(tick), "rm")
    for number in sorted({0, epochs // 4, epochs // 2, epochs * 3 // 4, epochs - 1}):
        canvas.text(place(number, low)[0], top + height + 16, str(number + 1), "mm")
    canvas.text(left + width / 2, top + height + 38, "epoch", "mm")
    x = float(left)
    for name, colour, line in series:
        points = [place(epoch, value) for epoch, value in enumerate(line)]
        if epochs > 1:
            canvas.line(points, colour, 2)
        canvas.dot(*points[best], colour)
        canvas.line([(x, top - 20), (x + 18, top - 20)], colour, 3)
        canvas.text(x + 26, top - 20, name, "lm", colour=_INK)
        x += 160


def _ticks(low: float, high: float) -> list[float]:
    """Return about five round numbers (steps of 1, 2 or 5 times a power of ten) that enclose low to high."""
    span = high - low or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / 4))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= span / 4)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, max(last, first + 1) + 1)]


def confusion(name: str, matrix: list[list[int]], labels: Sequence[str]) -> Image.Image:
    """Draw counts [C][C], row = true class, column = predicted; shades are shares of the row."""
    cell = 76 if len(labels) > 4 else 110
    left, top = 150, 110
    side = cell * len(labels)
    canvas = _Canvas(left + side + 30, top + side + 30)
    hits = sum(row[index] for index, row in enumerate(matrix))
    total = sum(map(sum, matrix))
    canvas.text(24, 26, f"{name}: {hits:,} of {total:,} test rows right", "lm", 17, _INK)
    canvas.text(left, 58, "predicted class", "lm")
    canvas.text(left - 12, top - 14, "true class", "rm")
    for index, label in enumerate(labels):
        middle = (index + 0.5) * cell
        canvas.text(left + middle, top - 14, label, "mm", colour=_INK)
        canvas.text(left - 12, top + middle, label, "rm", colour=_INK)
        row_total = max(1, sum(matrix[index]))
        for column, count in enumerate(matrix[index]):
            share = count / row_total
            colour = _shade(_BLUE, share) if column == index else _shade(_ORANGE, min(1.0, share * 8))
            x, y = left + column * cell, top + index * cell
            canvas.box(x + 1, y + 1, cell - 2, cell - 2, colour)
            ink = _PAPER if column == index and share > 0.5 else _INK if count else _GRID
            canvas.text(x + cell / 2, y + cell / 2, f"{count:,}", "mm", 15, ink)
    return canvas.finished()


def _shade(colour: tuple[int, int, int], share: float) -> tuple[int, int, int]:
    """Mix `colour` with near-white; share 0 is palest."""
    red, green, blue = (round(246 + (channel - 246) * share) for channel in colour)
    return red, green, blue
