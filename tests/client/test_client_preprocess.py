"""Pictures, arrays and texts to the input of a model. The digits are MNIST's own, so the wanted pixels are known."""

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from layercast.client.commands.common import SAMPLES
from layercast.client.errors import InputError
from layercast.client.preprocess import complete, prepare, tokens
from layercast.client.types import ModelMetadata, TensorInfo

Image = pytest.importorskip("PIL.Image", reason="Pillow comes with the images extra")

DIGITS = sorted(SAMPLES.glob("digit-*.png"))
GREY = {
    "kind": "image",
    "mode": "L",
    "width": 28,
    "height": 28,
    "scale": 1 / 255,
    "layout": "CHW",
    "background": "dark",
}
COLOUR = {"kind": "image", "mode": "RGB", "width": 32, "height": 32, "scale": 1 / 255, "layout": "CHW"}
TEXT = {"kind": "text", "encoding": "utf-8", "pad": 256, "max_length": 5, "overlong": "cut"}


def model(preprocessing: dict[str, Any] | None, shape: tuple[int, ...]) -> ModelMetadata:
    return ModelMetadata(
        name="m",
        versions=("1",),
        platform="",
        inputs=(TensorInfo("x", "FP32", shape),),
        outputs=(),
        labels=(),
        preprocessing=preprocessing,
        description="",
        properties={},
    )


MNIST = model(GREY, (-1, 1, 28, 28))
FLAT = model({**GREY, "layout": "FLAT"}, (-1, 784))
CIFAR = model(COLOUR, (-1, 3, 32, 32))
BARE = model(None, (-1, 2, 3))


def file_of(image: Any, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def npy(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def enlarged(digit: Any) -> Any:
    return np.asarray(Image.fromarray(digit).resize((280, 280), Image.Resampling.BICUBIC))


def off_centre(digit: Any) -> Any:
    canvas = np.zeros((400, 500), np.uint8)
    canvas[110:390, 15:295] = enlarged(digit)
    return canvas


def on_paper(digit: Any) -> Any:
    noise = np.random.default_rng(7).normal(0, 4, (400, 500))
    return (235 - 0.7 * off_centre(digit) + noise).clip(0, 255).astype(np.uint8)


def transparent(digit: Any, ink: int) -> Any:
    large = enlarged(digit)
    return Image.fromarray(np.dstack([np.full((*large.shape, 3), ink, np.uint8), large]))


# Any of these shows the same digit.
EXACT: dict[str, Callable[[Any], Any]] = {
    "as it is": lambda digit: file_of(Image.fromarray(digit)),
    "inverted": lambda digit: file_of(Image.fromarray(255 - digit)),
    "colour": lambda digit: file_of(Image.fromarray(np.dstack([digit] * 3))),
    "palette": lambda digit: file_of(Image.fromarray(digit).convert("P")),
    "16 bits": lambda digit: file_of(Image.fromarray(digit.astype(np.uint16) * 257)),
    "opaque alpha": lambda digit: file_of(Image.fromarray(digit).convert("LA")),
    "array": lambda digit: digit,
    "array file": npy,
    "inverted array": lambda digit: 255 - digit,
    "array of int64": lambda digit: digit.astype(np.int64),
    "array with a channel": lambda digit: digit[None],
    "array with a last channel": lambda digit: digit[..., None][None],
    "flat array": lambda digit: digit.reshape(-1),
    "scaled array": lambda digit: (digit / 255).astype(np.float32),
    "scaled flat array": lambda digit: (digit / 255).astype(np.float32).reshape(1, -1),
}
ALIKE: dict[str, Callable[[Any], Any]] = {
    "JPEG": lambda digit: file_of(Image.fromarray(digit), "JPEG", quality=85),
    "large": lambda digit: file_of(Image.fromarray(enlarged(digit))),
    "large inverted colour": lambda digit: file_of(Image.fromarray(np.dstack([255 - enlarged(digit)] * 3))),
    "off centre": lambda digit: file_of(Image.fromarray(off_centre(digit))),
    "noisy paper": lambda digit: file_of(Image.fromarray(on_paper(digit)), "JPEG", quality=80),
    "black ink on glass": lambda digit: file_of(transparent(digit, 0)),
    "white ink on glass": lambda digit: file_of(transparent(digit, 255)),
    "CMYK": lambda digit: file_of(Image.fromarray(enlarged(digit)).convert("CMYK"), "JPEG"),
    "two levels": lambda digit: file_of(Image.fromarray(enlarged(digit)).convert("1", dither=0)),
    "wide 16 bits": lambda digit: file_of(Image.fromarray(enlarged(digit).astype(np.uint16) * 257)),
    "turned by EXIF": lambda digit: file_of(Image.fromarray(digit).rotate(90, expand=True), exif=turned()),
    "in the corner of its frame": lambda digit: np.roll(digit, [-axis.min() for axis in np.nonzero(digit)], (0, 1)),
    "small": lambda digit: file_of(Image.fromarray(enlarged(digit)).resize((20, 20))),
}


def turned() -> Any:
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    return exif


def pixels(path: Path) -> Any:
    return np.asarray(Image.open(path))


def likeness(picture: Any, wanted: Any) -> float:
    """Correlation, whichever way the centre was rounded to a pixel."""
    shifts = [(down, across) for down in (-1, 0, 1) for across in (-1, 0, 1)]
    return max(float(np.corrcoef(np.roll(picture, shift, (0, 1)).ravel(), wanted.ravel())[0, 1]) for shift in shifts)


@pytest.mark.parametrize("spelling", EXACT)
@pytest.mark.parametrize("digit", DIGITS, ids=lambda path: path.stem)
def test_the_digit_comes_out_exactly(digit: Path, spelling: str) -> None:
    rows = prepare([EXACT[spelling](pixels(digit))], MNIST)
    assert rows.shape == (1, 1, 28, 28)
    assert rows.dtype == np.float32
    np.testing.assert_allclose(rows[0, 0], pixels(digit) / 255, atol=1e-6)


@pytest.mark.parametrize("spelling", ALIKE)
@pytest.mark.parametrize("digit", DIGITS, ids=lambda path: path.stem)
def test_the_digit_comes_out_nearly(digit: Path, spelling: str) -> None:
    (row,) = prepare([ALIKE[spelling](pixels(digit))], MNIST)
    assert likeness(row[0], pixels(digit)) > 0.85
    assert 0.9 < row.max() <= 1
    assert row.min() == 0


def test_another_digit_is_not_alike() -> None:
    rows = [prepare([path], MNIST)[0, 0] for path in DIGITS]
    assert max(likeness(rows[0], rows[1]), likeness(rows[1], rows[2]), likeness(rows[0], rows[2])) < 0.7


def test_layouts_and_several_inputs() -> None:
    digits = np.stack([pixels(path) for path in DIGITS])
    wanted = digits / np.float32(255)
    for batch in (digits, digits[:, None], digits[..., None], wanted, wanted[:, None]):
        np.testing.assert_allclose(prepare([batch], MNIST)[:, 0], wanted, atol=1e-6)
    np.testing.assert_allclose(prepare([*DIGITS, digits], MNIST)[:, 0], np.concatenate([wanted, wanted]), atol=1e-6)
    flat = wanted.reshape(3, 784)
    for batch in (digits, digits.reshape(3, 784), wanted, flat):
        np.testing.assert_allclose(prepare([batch], FLAT), flat, atol=1e-6)
    np.testing.assert_allclose(prepare([str(DIGITS[0])], FLAT), flat[:1], atol=1e-6)


def test_colour_pictures() -> None:
    (path,) = SAMPLES.glob("picture-*.png")
    picture = pixels(path)
    wanted = picture.transpose(2, 0, 1) / np.float32(255)
    scaled = picture / np.float32(255)
    for source in (
        path,
        picture,
        picture[None],
        picture.transpose(2, 0, 1),
        npy(picture),
        scaled,
        wanted,
        scaled[None],
    ):
        (row,) = prepare([source], CIFAR)
        np.testing.assert_allclose(row, wanted, atol=1e-6)
    wide = Image.fromarray(picture).resize((320, 320)).crop((-40, 0, 360, 320))
    (row,) = prepare([file_of(wide)], CIFAR)
    assert np.corrcoef(row.ravel(), wanted.ravel())[0, 1] > 0.95
    (grey,) = prepare([pixels(DIGITS[0])], CIFAR)
    assert np.array_equal(grey[0], grey[1])


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    def feed(content: bytes) -> None:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))

    feed(DIGITS[0].read_bytes())
    assert np.array_equal(prepare(["-"], MNIST), prepare([DIGITS[0]], MNIST))
    feed("ab\r\n\nc\u2028é\n".encode())
    assert prepare(["-"], model(TEXT, (-1, -1))).tolist() == [[97, 98, 256, 256, 256], [99, 0xE2, 0x80, 0xA8, 0xC3]]
    feed(b"")
    with pytest.raises(InputError, match="standard input holds no text"):
        prepare(["-"], model(TEXT, (-1, -1)))


def test_texts_become_padded_bytes() -> None:
    batch = prepare(["é", "abcdefgh"], model(TEXT, (-1, -1)))
    assert batch.dtype == np.int64
    assert batch.tolist() == [[0xC3, 0xA9, 256, 256, 256], [97, 98, 99, 100, 101]]
    # A byte that is not UTF-8 reaches a program as a lone surrogate.
    assert tokens(["\udcff"], TEXT).tolist() == [[255]]
    assert tokens(["\xe9"], {**TEXT, "encoding": "latin-1"}).tolist() == [[0xE9]]
    assert prepare([np.array([1, 2])], model(TEXT, (-1, -1))).tolist() == [[1, 2]]


def test_models_without_preprocessing_take_arrays(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(6).reshape(2, 3))
    both = prepare([str(tmp_path / "a.npy"), np.zeros((2, 2, 3), int)], BARE)
    assert both.tolist() == [[[0, 1, 2], [3, 4, 5]], [[0, 0, 0], [0, 0, 0]], [[0, 0, 0], [0, 0, 0]]]


@pytest.mark.parametrize(
    ("given", "wanted", "result"),
    [
        ((2, 3), (-1, 2, 3), (1, 2, 3)),
        ((6,), (-1, 2, 3), (1, 2, 3)),
        ((4, 6), (-1, 2, 3), (4, 2, 3)),
        ((28, 28), (-1, 784), (1, 784)),
        ((5, 28, 28), (-1, 784), (5, 784)),
        ((5, 28, 28), (-1, 1, 28, 28), (5, 1, 28, 28)),
        ((7, 9), (-1, -1), (7, 9)),
        ((7,), (-1, -1), (1, 7)),
        ((8, 6, 3), (-1, 3, 8, 6), (1, 3, 8, 6)),
        ((0, 2, 3), (-1, 2, 3), (0, 2, 3)),
    ],
)
def test_missing_axes_are_added(given: tuple[int, ...], wanted: tuple[int, ...], result: tuple[int, ...]) -> None:
    array = np.arange(np.prod(given)).reshape(given)
    assert complete(array, wanted, "x").shape == result


@pytest.mark.parametrize(
    ("source", "metadata", "text"),
    [
        (np.full((28, 28), 255, "f4"), MNIST, "values from 0 to 255, the model takes 0 to 1: multiply by 0.00392157"),
        (np.full((28, 28), -0.4, "f4"), MNIST, "values from -0.4 to 0, .* undo the normalisation"),
        (np.zeros((3, 5)), MNIST, r"shape \[3, 5\]; the model takes \[-1, 1, 28, 28\]"),
        (np.full((28, 28), 256), MNIST, "grey levels are 0 to 255"),
        (np.full((28, 28), "a"), MNIST, "a picture is numbers"),
        (np.zeros((2, 3, 4, 5, 6), "u1"), MNIST, "no layout of pictures"),
        (np.zeros((), "u1"), MNIST, "no layout of pictures"),
        (np.zeros((0, 28, 28), "u1"), MNIST, "holds 0 elements"),
        (np.full((50, 60), 7, "u1"), MNIST, "blank: nothing stands out"),
        (b"junk", MNIST, "neither an image that Pillow reads nor a .npy file"),
        (DIGITS[0].read_bytes()[:150], MNIST, "damaged or oversized"),
        (b"\x93NUMPY junk", MNIST, "not a .npy file that can be read"),
        ("missing.png", MNIST, "missing.png: No such file"),
        (".", MNIST, "Is a directory"),
        (DIGITS[0], BARE, "not a .npy file"),
        (npy(np.array([None])), BARE, "not a .npy file"),
        ("", model(TEXT, (-1, -1)), "a text is empty"),
        ("abcdefgh", model({**TEXT, "overlong": "refuse"}, (-1, -1)), "has 8 bytes; the model takes at most 5"),
        ("x", model({"kind": "text"}, (-1, -1)), "preprocessing is incomplete"),
        ("x", model({"kind": "image"}, (-1, 1)), "preprocessing is incomplete"),
        ("x", model({**GREY, "mode": "HSV"}, (-1, 1)), "does not know the preprocessing"),
        ("x", model({"kind": "audio"}, (-1, 1)), "preprocessing of kind 'audio'"),
    ],
)
def test_what_cannot_be_used_is_explained(source: Any, metadata: ModelMetadata, text: str) -> None:
    with pytest.raises(InputError, match=text):
        prepare([source], metadata)


def test_batches_that_do_not_belong_together() -> None:
    with pytest.raises(InputError, match="nothing to send"):
        prepare([], MNIST)
    with pytest.raises(InputError, match="text and arrays of tokens do not mix"):
        prepare(["a", np.zeros(3)], model(TEXT, (-1, -1)))
    with pytest.raises(InputError, match="different shapes"):
        prepare([np.zeros(3), np.zeros(4)], model(None, (-1, -1)))
    two_inputs = replace(MNIST, inputs=(*MNIST.inputs, TensorInfo("mask", "BOOL", (-1,))))
    with pytest.raises(InputError, match="inputs x, mask"):
        prepare([DIGITS[0]], two_inputs)


def test_an_npz_is_recognised() -> None:
    buffer = io.BytesIO()
    np.savez(buffer, a=np.zeros(3))
    with pytest.raises(InputError, match=r"is an \.npz archive"):
        prepare([buffer.getvalue()], BARE)
