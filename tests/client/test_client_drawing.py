"""Pictures read back: what is drawn where, in which colour, with nothing cut off."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from layercast.client.errors import InputError

image_module = pytest.importorskip("PIL.Image", reason="Pillow comes with the images extra")

from layercast.client.drawing import canvas, explanations, features  # noqa: E402
from layercast.client.drawing.colours import DIVERGING, NOT_A_NUMBER, VIRIDIS, Scale, coloured  # noqa: E402
from layercast.client.drawing.rows import Token, picture_of, spec_of, tokens_of  # noqa: E402
from layercast.client.drawing.values import coloured_text, matrix, vector  # noqa: E402

TEXT = {"kind": "text", "encoding": "utf-8", "pad": 256, "max_length": 99}
FLAT = {"kind": "image", "mode": "L", "width": 4, "height": 2, "scale": 1 / 255, "layout": "FLAT"}


def pixels(image: Any) -> np.ndarray:
    return np.asarray(image.convert("RGB"), np.int64)


def places(image: Any, colour: tuple[int, int, int]) -> np.ndarray:
    """Lines and columns of the pixels of exactly this colour, [2, n]."""
    return np.array(np.nonzero((pixels(image) == colour).all(axis=-1)))


def test_colour_maps_end_where_their_anchors_do() -> None:
    assert coloured(np.array([0, 1, -3, 7, 0.5]), VIRIDIS).tolist() == [
        [*VIRIDIS[0]], [*VIRIDIS[-1]], [*VIRIDIS[0]], [*VIRIDIS[-1]], [*VIRIDIS[4]],
    ]  # fmt: skip
    assert coloured(np.array([np.nan, np.inf]), VIRIDIS).tolist() == [[*NOT_A_NUMBER]] * 2


def test_scales_diverge_about_zero_when_some_value_is_negative() -> None:
    scale = Scale(np.array([-1.0, 0, 4, np.nan]))
    assert (scale.low, scale.high, scale.signed) == (-4, 4, True)
    assert scale.colours(np.array([0.0, 4, -4])).tolist() == [[*DIVERGING[3]], [*DIVERGING[-1]], [*DIVERGING[0]]]
    plain = Scale(np.array([2.0, 6]))
    assert (plain.low, plain.high, plain.shares(np.array(3.0))) == (2, 6, 0.25)
    stretched = Scale(np.array([-1.0, 3]), stretched=True)
    assert (stretched.low, stretched.high, stretched.signed) == (-1, 3, False)
    assert Scale(np.full(3, np.nan)).shares(np.ones(2)).tolist() == [0, 0]


def test_every_channel_has_a_map_of_its_own_range() -> None:
    """64 channels, of which channel k is lowest everywhere but at one place, whatever its size."""
    maps = np.zeros((64, 8, 8), "f4")
    for channel in range(64):
        maps[channel, channel // 8, channel % 8] = 10.0 ** (-channel / 4) if channel % 2 else 10.0
    body = features.body(maps, None, (1, 8, 8))
    bright = places(body, VIRIDIS[-1])
    assert bright.shape[1] == 64 * 8 * 8  # one value of each map, 8 by 8 pixels
    assert places(body, VIRIDIS[0]).shape[1] == 64 * 63 * 64
    # Channel k has its bright place at (k // 8, k % 8) of the map in line k // 8 and column k % 8.
    assert len(np.unique(bright[0])) == len(np.unique(bright[1])) == 64
    one = features.body(maps[:1], None, (1, 8, 8))
    assert places(one, VIRIDIS[-1]).shape[1] >= 32 * 32


def test_large_maps_shrink_and_odd_ones_are_said() -> None:
    assert max(features.body(np.ones((20, 300, 200)), None, ()).size) < 500
    assert features.body(np.ones((2, 2, 2, 2)), None, ()).size[0] > 100
    assert features.body(np.zeros((0,)), None, ()).size[0] > 100


def test_attention_has_its_tokens_along_both_axes_and_no_padding() -> None:
    row = np.array([*b"abc", 256, 256])
    tokens = tokens_of(row, TEXT)
    weights = np.full((2, 5, 5), 0.25)
    weights[:, 3:] = weights[:, :, 3:] = 7  # at padding, where nobody looks
    weights[1, 2, 0] = 1
    body = features.body(weights, tokens, row.shape)
    lit = places(body, VIRIDIS[-1])
    # The third token's line, the first one's column, of the second head; the ends of two scales are as bright.
    scale = canvas.scale_bar(Scale(weights)).height + 4
    cell = lit[:, lit[0] < body.height - scale]
    assert cell.shape[1] == 18 * 18
    dark = places(body, VIRIDIS[0])
    assert cell[0].max() == dark[0][dark[0] < body.height - scale].max()  # the last line
    second = dark[1][dark[1] > body.width // 2].min()
    assert second - cell[1].max() <= 1  # left of the first dark place of that head


def test_labels_along_a_matrix_are_in_order() -> None:
    """A blot for a text at the left is in the line, and at the top in the column, of its token."""
    texts = ["", "", "WWWWWW", ""]
    image = matrix(np.zeros((4, 4)), texts, texts)
    body = places(image, VIRIDIS[0])
    top = body[0].min()
    left = body[1][body[0] < top + 72].min()
    ink = (pixels(image).max(axis=-1) < 120) & ~(pixels(image) == VIRIDIS[0]).all(axis=-1)
    side, above = ink[top : top + 72, :left], ink[:top, left : left + 72]
    assert 36 <= np.nonzero(side)[0].min() <= np.nonzero(side)[0].max() < 54
    assert 36 <= np.nonzero(above)[1].min() <= np.nonzero(above)[1].max() < 54
    assert not side[:, 0].any()  # nothing cut at the edge of the picture
    assert np.nonzero(above)[0].max() >= top - 8  # beside what it names


@pytest.mark.parametrize("count", [1, 10, 128, 129, 5000])
def test_vectors_of_any_length(count: int) -> None:
    values = np.linspace(-1, 1, count)
    image = vector(values)
    assert image.width < 800
    assert places(image, DIVERGING[0]).size or count == 1


def test_bars_are_as_high_as_their_values() -> None:
    image = vector(np.array([1.0, -0.5, 0.25, np.nan]))
    up, down = places(image, DIVERGING[-1]), places(image, DIVERGING[0])
    heights = [np.ptp(up[0][up[1] < up[1].min() + 20]), np.ptp(down[0])]
    assert heights[0] == pytest.approx(2 * heights[1], abs=3)
    assert down[1].min() > up[1].min()


def test_text_breaks_at_spaces_and_keeps_every_token() -> None:
    words = [Token(character, place, place + 1) for place, character in enumerate("word " * 60)]
    image = coloured_text(words, [1.0] + [0.0] * 299, Scale(np.array([0.0, 1.0]), DIVERGING[3:]))
    assert image.width <= 900
    first = places(image, DIVERGING[-1])
    assert first[0].max() < 26
    assert first[1].max() < 30
    ground = places(image, DIVERGING[3])
    assert ground[0].max() == image.height - 1


def test_bytes_are_shown_as_characters() -> None:
    row = np.array([*"é €\n".encode(), 0xC3, 256, 256])
    tokens = tokens_of(row, TEXT)
    assert tokens == [
        Token("é", 0, 2), Token(" ", 2, 3), Token("€", 3, 6), Token("\\n", 6, 7), Token("\\xc3", 7, 8),
    ]  # fmt: skip
    assert tokens_of(np.array([7, 0]), None) == [Token("7", 0, 1), Token("0", 1, 2)]
    assert tokens_of(np.zeros(3, "f4"), None) is None


def test_a_character_counts_as_much_as_its_bytes_together() -> None:
    row = np.array([*"aé".encode()])
    image = explanations.figure(row[None], np.array([[1.0, 0.5, 0.5]]), ["text"], TEXT)
    assert places(image, DIVERGING[3]).size  # all the same: the lowest colour of the scale
    image = explanations.figure(row[None], np.array([[1.0, 1, 1]]), ["text"], TEXT)
    red = places(image, DIVERGING[-1])
    assert red[1][red[0] < red[0].min() + 20].min() > 20


def test_flat_pictures_are_pictures() -> None:
    row = np.zeros(8, "f4")
    row[5] = 1
    shown = picture_of(row, spec_of(FLAT))
    assert shown is not None
    assert shown.shape == (2, 4, 3)
    assert shown[1, 1].tolist() == [255] * 3
    values = np.zeros((1, 8))
    values[0, 6] = -2
    image = explanations.figure(row[None], values, ["flat"], FLAT)
    blue = places(image, DIVERGING[0])
    patch = blue[:, blue[0] < image.height - 25]
    assert (np.ptp(patch[0]), np.ptp(patch[1])) == (55, 55)
    assert patch[1].min() == 12 + 224 + 6 + 2 * 56  # the third column of the overlay


def test_many_rows_make_a_grid_and_too_many_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.zeros((30, 3, 32, 32), "f4")
    image = explanations.figure(rows, rows, [f"row {number}" for number in range(30)], None)
    assert image.width <= 1424
    assert image.height > 10 * 224
    monkeypatch.setattr(canvas, "MOST_PIXELS", 100_000)
    with pytest.raises(InputError, match="choose fewer rows or layers"):
        explanations.figure(rows, rows, ["row"] * 30, None)
    with pytest.raises(InputError, match="can't be drawn; save them"):
        explanations.figure(np.zeros((1, 2, 2, 2, 2)), np.zeros((1, 2, 2, 2, 2)), ["x"], None)


def test_no_text_is_cut_off_and_none_is_lost() -> None:
    for text in ("layer1 [64, 32, 32]", "jÅgy_|", "…", "你好"):
        ink = pixels(canvas.label(text)).min(axis=-1) < 128
        roomy = canvas.blank(400, 100)
        canvas.write(roomy, (200, 50), text, canvas.TEXT, canvas.INK)
        assert ink.sum() == pytest.approx((pixels(roomy).min(axis=-1) < 128).sum(), rel=0.05)
        assert ink.sum() > 5
    assert canvas.label("你好").width > canvas.label("..").width


@pytest.mark.parametrize("ending", [".png", ".jpg", ".jpeg", ".webp"])
def test_pictures_are_written_in_the_format_of_their_ending(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"picture{ending}"
    canvas.save(canvas.label("text"), path)
    with image_module.open(path) as image:
        assert image.format == {".png": "PNG", ".webp": "WEBP"}.get(ending, "JPEG")
    assert list(tmp_path.iterdir()) == [path]
