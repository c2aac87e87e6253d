"""Files, arrays and text to the input of a model, as its `preprocessing` metadata describes it.

Integer arrays and image files are pictures: scaled, resized, inverted and centred as needed. Float arrays are taken as
prepared; only missing axes are added, and values that cannot be right (0 to 255 where 0 to 1 is wanted) are refused.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from layercast.client import pictures
from layercast.client.errors import InputError
from layercast.client.pictures import PictureSpec
from layercast.client.types import ModelMetadata
from layercast.proto.codec import AnyArray

# A path ("-" is standard input) or, for a text model, the text itself; or what such a file would hold.
Source = str | Path | bytes | AnyArray

STDIN = "-"


def prepare(sources: Sequence[Source], metadata: ModelMetadata) -> AnyArray:
    """The batch for a model's only input: one row for each picture or line, more for an array with a batch axis.

    Raises InputError that says which source is wrong and why.
    """
    kind = kind_of(metadata)
    if not sources:
        raise InputError("nothing to send: pass at least one input")
    shape = metadata.inputs[0].shape
    if kind == "text":
        return _text_batch(sources, metadata.preprocessing or {}, shape)
    if kind == "image":
        spec = PictureSpec.parse(metadata.preprocessing or {})
        batches = [_picture_rows(source, spec, shape) for source in sources]
    else:
        batches = [complete(_array(_read(source), _name(source)), shape, _name(source)) for source in sources]
    return _joined(batches)


def kind_of(metadata: ModelMetadata) -> str | None:
    """What a model's only input is made from: image, text, or None for arrays.

    Raises InputError for a model with several inputs, or preprocessing that is not known here.
    """
    if len(metadata.inputs) != 1:
        names = ", ".join(info.name for info in metadata.inputs)
        raise InputError(f"model {metadata.name!r} has the inputs {names}; use the Python client, which takes a dict")
    kind = (metadata.preprocessing or {}).get("kind")
    if kind not in ("image", "text", None):
        raise InputError(f"this client does not know preprocessing of kind {kind!r}; use the Python client")
    return kind


def tokens(texts: Sequence[str], preprocessing: Mapping[str, Any]) -> NDArray[np.int64]:
    """Bytes of each text as numbers, [rows, length of the longest]; shorter rows are filled with `pad`."""
    try:
        encoding, pad, limit = str(preprocessing["encoding"]), int(preprocessing["pad"]), preprocessing["max_length"]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"the model's preprocessing is incomplete ({error!r}); pass a .npy file of tokens") from error
    # Arguments and standard input that are not UTF-8 arrive with surrogates in the place of bytes.
    coded = [text.encode(encoding, "surrogateescape") for text in texts]
    for text, content in zip(texts, coded, strict=True):
        if not content:
            raise InputError("a text is empty")
        if limit is not None and len(content) > limit and preprocessing.get("overlong") != "cut":
            raise InputError(f"text {text[:20]!r}... has {len(content)} bytes; the model takes at most {limit}")
    cut = [content[:limit] for content in coded]
    batch = np.full((len(cut), max(map(len, cut))), pad, np.int64)
    for index, content in enumerate(cut):
        batch[index, : len(content)] = np.frombuffer(content, np.uint8)
    return batch


def complete(array: AnyArray, shape: Sequence[int], name: str) -> AnyArray:
    """Add the axes that the model's shape has and the array lacks (the batch, a single channel), or flatten rows."""
    inner = tuple(shape[1:])
    if array.ndim == len(shape) and _matches(array.shape[1:], inner):
        return array
    if _matches(array.shape, inner):
        return array[None]
    size = math.prod(inner) if all(extent > 0 for extent in inner) else 0
    if size and len(inner) == 3 and array.shape[-3:] == (inner[1], inner[2], inner[0]):
        return np.moveaxis(array, -1, -3).reshape(-1, *inner)
    if size and array.ndim and _is_spelling(array.shape, inner):
        return array.reshape(1, *inner)
    if size and array.ndim > 1 and _is_spelling(array.shape[1:], inner):
        return array.reshape(-1, *inner)
    raise InputError(f"{name} has shape {list(array.shape)}; the model takes {list(shape)}, the first being the batch")


def _matches(shape: Sequence[int], pattern: Sequence[int]) -> bool:
    return len(shape) == len(pattern) and all(want in (-1, got) for got, want in zip(shape, pattern, strict=True))


def _is_spelling(shape: Sequence[int], inner: Sequence[int]) -> bool:
    """Does `shape` mean one row of `inner`: the same but for axes of size 1, or one of the two flat?"""
    without_ones = [extent for extent in shape if extent != 1]
    is_same = without_ones == [extent for extent in inner if extent != 1]
    is_flat = len(without_ones) == 1 or len(inner) == 1
    return is_same or (is_flat and math.prod(shape) == math.prod(inner))


def _text_batch(sources: Sequence[Source], preprocessing: Mapping[str, Any], shape: Sequence[int]) -> AnyArray:
    arrays = [source for source in sources if not isinstance(source, str) or source.endswith(".npy")]
    if arrays:
        if len(arrays) != len(sources):
            raise InputError("text and arrays of tokens do not mix; send them separately")
        return _joined([complete(_array(_read(source), _name(source)), shape, _name(source)) for source in arrays])
    texts: list[str] = []
    for source in sources:
        texts += _lines(_read(source)) if source == STDIN else [str(source)]
    if not texts:
        raise InputError("standard input holds no text")
    return tokens(texts, preprocessing)


def _lines(content: bytes | AnyArray) -> list[str]:
    """One text a line; empty lines are skipped."""
    text = content.decode("utf-8", "surrogateescape") if isinstance(content, bytes) else ""
    return [line for line in text.replace("\r\n", "\n").split("\n") if line.strip()]


def _picture_rows(source: Source, spec: PictureSpec, shape: Sequence[int]) -> AnyArray:
    name = _name(source)
    content = _read(source)
    if isinstance(content, bytes) and not content.startswith(b"\x93NUMPY"):
        return pictures.row(pictures.decode(content, name), spec, name)[None]
    array = _array(content, name)
    if array.dtype.kind == "f":
        _check_range(array, spec, name)
        return complete(array, shape, name)
    levels = _levels(array, name)
    image_module = pictures.pillow()
    return np.stack([pictures.row(image_module.fromarray(one), spec, name) for one in _split(levels, spec, name)])


def _check_range(array: AnyArray, spec: PictureSpec, name: str) -> None:
    top = 255 * spec.scale
    low, high = float(array.min(initial=0)), float(array.max(initial=0))
    if low < -1e-3 or high > top * 1.001:
        hint = f"multiply by {spec.scale:.6g}, or save bytes (uint8)" if low >= 0 else "undo the normalisation"
        raise InputError(f"{name} has values from {low:.4g} to {high:.4g}, the model takes 0 to {top:g}: {hint}")


def _levels(array: AnyArray, name: str) -> NDArray[np.uint8]:
    if array.dtype.kind == "b":
        return array.astype(np.uint8) * np.uint8(255)
    if array.dtype.kind not in "iu" or array.size == 0:
        raise InputError(f"{name} holds {array.size} elements of {array.dtype}; a picture is numbers")
    if array.min() < 0 or array.max() > 255:
        raise InputError(f"{name} has values from {array.min()} to {array.max()}; grey levels are 0 to 255")
    return array.astype(np.uint8)


def _split(levels: NDArray[np.uint8], spec: PictureSpec, name: str) -> list[NDArray[np.uint8]]:
    """Single pictures, [height, width] or [height, width, channels], out of an array in any usual layout."""
    shape = levels.shape
    if 0 < levels.ndim <= 2 and shape[-1] == spec.width * spec.height and shape != (spec.height, spec.width):
        return list(levels.reshape(-1, spec.height, spec.width))
    if levels.ndim == 2 or (levels.ndim == 3 and shape[-1] in (3, 4)):
        return [levels]
    if levels.ndim == 3 and spec.mode == "RGB" and shape[0] in (3, 4):
        return [levels.transpose(1, 2, 0)]
    if levels.ndim == 3:
        return list(levels)
    if levels.ndim == 4 and shape[1] in (1, 3, 4):
        levels = levels.transpose(0, 2, 3, 1)
    if levels.ndim == 4 and levels.shape[-1] in (1, 3, 4):
        return list(levels[..., 0] if levels.shape[-1] == 1 else np.ascontiguousarray(levels))
    raise InputError(f"{name} has shape {list(shape)}, which is no layout of pictures; use [rows, height, width]")


def _joined(batches: Sequence[AnyArray]) -> AnyArray:
    try:
        return np.concatenate(batches)
    except ValueError as error:
        raise InputError(f"the inputs have different shapes and cannot be sent together: {error}") from error


def _name(source: Source) -> str:
    if isinstance(source, bytes | np.ndarray):
        return "the input"
    return "standard input" if source == STDIN else str(source)


def _read(source: Source) -> bytes | AnyArray:
    if isinstance(source, bytes | np.ndarray):
        return source
    if source == STDIN:
        return sys.stdin.buffer.read()
    try:
        return Path(source).read_bytes()
    except OSError as error:
        raise InputError(f"{source}: {error.strerror}") from error


def _array(content: bytes | AnyArray, name: str) -> AnyArray:
    if isinstance(content, np.ndarray):
        return content
    try:
        loaded = np.load(BytesIO(content), allow_pickle=False)
    except (ValueError, EOFError, OSError, MemoryError) as error:
        raise InputError(f"{name} is not a .npy file that can be read: {error}") from error
    if not isinstance(loaded, np.ndarray):
        raise InputError(f"{name} is an .npz archive; save the one array with np.save")
    return loaded
