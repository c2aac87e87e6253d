"""Explanations as pictures: the attribution laid over what was sent, one tile a row."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from layercast.client.drawing import canvas
from layercast.client.drawing.colours import DIVERGING, HEAT, RED, Scale, coloured
from layercast.client.drawing.rows import as_map, picture_of, spec_of, tokens_of
from layercast.client.drawing.values import coloured_text, vector
from layercast.client.errors import InputError
from layercast.proto.codec import AnyArray

if TYPE_CHECKING:
    from PIL.Image import Image

_TILE = 224
_PAGE = 1400
# How much of a faint picture is left below signed values, and how much of a map covers a picture.
_FAINT_SHARE, _COVER = 0.3, 0.75


def figure(
    batch: AnyArray, attributions: AnyArray, titles: Sequence[str], preprocessing: Mapping[str, Any] | None
) -> "Image":
    """One tile for each row: its title, what was sent with the attribution over it, and the scale.

    `attributions` are those of `batch`, as `Explanation` has them. Raises InputError for rows of a shape that can't be
    drawn.
    """
    tiles = [_tile(*row, preprocessing) for row in zip(batch, attributions, titles, strict=True)]
    return canvas.framed(canvas.flowing(tiles, _PAGE, 2 * canvas.GAP))


def _tile(row: AnyArray, values: AnyArray, title: str, preprocessing: Mapping[str, Any] | None) -> "Image":
    heading = canvas.label(title)
    tokens = tokens_of(row, preprocessing)
    if tokens is not None and values.ndim == 1:
        sums = [float(values[token.start : token.stop].sum()) for token in tokens]
        scale = Scale(np.array(sums), RED)
        return canvas.stacked([heading, coloured_text(tokens, sums, scale), canvas.scale_bar(scale)], 6)
    spec = spec_of(preprocessing)
    shown = picture_of(row, spec)
    flat = _collapsed(as_map(values, spec))
    if flat.ndim == 1:
        return canvas.stacked([heading, vector(flat)], 6)
    if flat.ndim != 2:
        raise InputError(f"attributions of shape {list(values.shape)} a row can't be drawn; save them with --output")
    scale = Scale(flat, HEAT)
    height, width = shown.shape[:2] if shown is not None else flat.shape
    size = canvas.fitted(height, width, _TILE)
    heat = canvas.from_colours(scale.colours(flat), *size)
    if shown is None:
        return canvas.stacked([heading, heat, canvas.scale_bar(scale)], 6)
    picture = canvas.from_colours(shown, *size)
    pair = canvas.beside([picture, overlay(picture, flat, scale)], 6)
    return canvas.stacked([heading, pair, canvas.scale_bar(scale)], 6)


def _collapsed(values: AnyArray) -> AnyArray:
    """[C, H, W] to [H, W]: shares of a score add up; of values that have no sign the largest channel counts."""
    if values.ndim != 3:
        return values
    collapsed: AnyArray = values.sum(axis=0) if (values < 0).any() else values.max(axis=0)
    return collapsed


def overlay(picture: "Image", values: AnyArray, scale: Scale) -> "Image":
    """The map of `values` laid over the picture, the more opaque the further a value is from nothing.

    Signed values lie on a faint picture, so that both ends of their scale stand out; others on the picture itself.
    """
    share = canvas.sampled(np.nan_to_num(scale.shares(values)), *picture.size)[..., None]
    ground = np.asarray(picture, np.float64)
    if scale.signed:
        ground = ground.mean(axis=-1, keepdims=True) * _FAINT_SHARE + 255 * (1 - _FAINT_SHARE)
        weight = np.abs(2 * share - 1)
        above = np.where(share >= 0.5, DIVERGING[-1], DIVERGING[0])
    else:
        weight = share * _COVER
        above = coloured(share[..., 0], HEAT)
    mixed = ground * (1 - weight) + above * weight
    return canvas.from_colours(mixed.round().astype(np.uint8), *picture.size)
