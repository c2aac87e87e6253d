"""One picture, of any size, mode and background, to the array that an image model was trained on. Needs Pillow."""

from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from layercast.client.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

Pixels = NDArray[np.float64]

# How MNIST was made: the digit fitted into 20 of 28 pixels, its centre of mass put on the centre of the picture.
_INK_SHARE = 20 / 28
# Darker than a fifth of the darkest stroke is paper, shade or JPEG noise.
_INK_LEVEL = 0.2
# Digits of MNIST are within 0.51 pixels of the centre; two pixels of 28 are no accident.
_OFF_CENTRE = 2 / 28


@dataclass(frozen=True, slots=True)
class PictureSpec:
    """The `preprocessing` of an image model."""

    mode: str
    width: int
    height: int
    scale: float
    flat: bool
    dark_background: bool

    @classmethod
    def parse(cls, preprocessing: Mapping[str, Any]) -> Self:
        """Raises InputError when the server's description lacks something or is of a kind unknown here."""
        try:
            spec = cls(
                mode=str(preprocessing["mode"]),
                width=int(preprocessing["width"]),
                height=int(preprocessing["height"]),
                scale=float(preprocessing["scale"]),
                flat=preprocessing["layout"] == "FLAT",
                dark_background=preprocessing.get("background") == "dark",
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"the model's preprocessing is incomplete ({error!r}); pass a prepared .npy file"
            ) from error
        known = spec.mode in ("L", "RGB") and preprocessing["layout"] in ("CHW", "FLAT")
        if not known or min(spec.width, spec.height) < 1:
            raise InputError(f"this client does not know the preprocessing {dict(preprocessing)}; pass a .npy file")
        return spec


def decode(data: bytes, name: str) -> "Image":
    """Decode a PNG, JPEG or other image file, upright. `name` is for error texts."""
    image_module = pillow()
    from PIL import ImageOps

    try:
        image: Image = image_module.open(BytesIO(data))
        image.load()
        return ImageOps.exif_transpose(image)
    except image_module.UnidentifiedImageError as error:
        raise InputError(f"{name} is neither an image that Pillow reads nor a .npy file") from error
    except (OSError, SyntaxError, ValueError, image_module.DecompressionBombError) as error:
        raise InputError(f"{name} is a damaged or oversized image: {error}") from error


def pillow() -> Any:
    """PIL.Image, or the advice to install it."""
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise InputError("images need Pillow: pip install 'layercast[images]'") from error
    return Image


def row(image: "Image", spec: PictureSpec, name: str) -> NDArray[np.float32]:
    """The picture as one row of the model's input, [channels, height, width] or flat."""
    if spec.mode == "L" and spec.dark_background:
        pixels = _dark_digit(_grey(image), spec, name)[None]
    else:
        from PIL import ImageOps

        fitted = ImageOps.fit(_opaque(image).convert(spec.mode), (spec.width, spec.height))
        pixels = np.asarray(fitted, np.float64).reshape(spec.height, spec.width, -1).transpose(2, 0, 1)
    scaled = (pixels * spec.scale).astype(np.float32)
    return scaled.reshape(-1) if spec.flat else scaled


def _grey(image: "Image") -> Pixels:
    """Brightness 0 to 255. Pictures of more than 8 bits are scaled, since Pillow would clip them."""
    if image.mode.startswith("I"):
        wide = np.asarray(image, np.float64)
        return wide / 257 if wide.max(initial=0) > 255 else wide
    if image.mode == "F":
        wide = np.asarray(image, np.float64)
        return wide * 255 if wide.max(initial=0) <= 1 else wide.clip(0, 255)
    return np.asarray(_opaque(image).convert("L"), np.float64)


def _opaque(image: "Image") -> "Image":
    """Lay a transparent picture on white, or on black when what is drawn is bright and would vanish on white."""
    if not image.has_transparency_data:
        return image
    drawn = image.convert("RGBA")
    alpha = np.asarray(drawn.getchannel("A"), np.float64)
    brightness = np.asarray(drawn.convert("RGB").convert("L"), np.float64)
    is_bright = (brightness * alpha).sum() > 127 * alpha.sum()
    paper: Image = pillow().new("RGBA", drawn.size, "black" if is_bright else "white")
    paper.alpha_composite(drawn)
    return paper


def _dark_digit(grey: Pixels, spec: PictureSpec, name: str) -> Pixels:
    """Bright ink on a dark ground, placed as in MNIST. A picture of the right size is only turned bright, and centred
    when it is far off; any other is cut to its ink first."""
    border = np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
    if np.median(border) > 127:
        grey, border = 255 - grey, 255 - border
    if grey.shape == (spec.height, spec.width):
        return _recentred(grey, spec)
    ink = (grey - np.median(border)).clip(0)
    if ink.max() < 16:
        raise InputError(f"{name} is blank: nothing stands out from the background")
    rows, columns = np.nonzero(ink > ink.max() * _INK_LEVEL)
    cut = ink[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    return _centred(_resized(cut, spec), spec)


def _recentred(grey: Pixels, spec: PictureSpec) -> Pixels:
    if not grey.any():
        return grey
    down, across = _centre_of_mass(grey)
    if max(abs(down - spec.height / 2), abs(across - spec.width / 2)) <= spec.width * _OFF_CENTRE:
        return grey
    rows, columns = np.nonzero(grey)
    return _centred(grey[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1], spec)


def _resized(cut: Pixels, spec: PictureSpec) -> Pixels:
    """Fit the ink into its share of the picture, keep its proportions, and make its brightest stroke white."""
    image_module = pillow()
    height, width = cut.shape
    factor = min(spec.width * _INK_SHARE / width, spec.height * _INK_SHARE / height)
    size = max(round(width * factor), 1), max(round(height * factor), 1)
    resized = image_module.fromarray(cut.astype(np.float32)).resize(size, image_module.Resampling.LANCZOS)
    pixels: Pixels = np.asarray(resized, np.float64).clip(0)
    brightest = float(pixels.max())
    return pixels * (255 / brightest)


def _centred(patch: Pixels, spec: PictureSpec) -> Pixels:
    """Lay the patch on black with its centre of mass as near to the centre as it fits."""
    height, width = patch.shape
    down, across = _centre_of_mass(patch)
    top = min(max(round(spec.height / 2 - down), 0), spec.height - height)
    left = min(max(round(spec.width / 2 - across), 0), spec.width - width)
    picture = np.zeros((spec.height, spec.width))
    picture[top : top + height, left : left + width] = patch
    return picture


def _centre_of_mass(pixels: Pixels) -> tuple[float, float]:
    down, across = np.indices(pixels.shape)
    return float((down * pixels).sum() / pixels.sum()), float((across * pixels).sum() / pixels.sum())
