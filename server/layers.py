"""Taps: from what a request asks for (`layer:encoder.*@mean`) to layers of the model's index, with their sizes."""

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass

from layercast.models.layer_names import match_layers, nearest
from layercast.models.manifest import LayerSpec, Manifest
from layercast.models.reducers import POOLING, REDUCERS, ReducerError, gives_floats, pools, reduced_shape, split_tap
from layercast.proto.codec import DATATYPES, quoted
from layercast.server.errors import InvalidArgument, ResourceExhausted
from layercast.server.settings import ModelSettings
from layercast.server.work import Tap

MAX_PATTERNS = 256
MAX_PATTERN_LENGTH = 256
MAX_REDUCERS = 4
OFF = "this model gives no layers (its setting features is false)"
NOT_LISTED = "this model gives only the layers that its setting feature_layers lists"
POOLED_ONLY = f"this model gives its layers pooled only, reduced by {', '.join(POOLING)}"
PREFIX = "layer:"
"""An output of this prefix names a layer, not an output of the model."""

ENVELOPE = 64 << 10
"""Bytes of a message beside its values, for names, shapes and parameters."""

_TAP_ENVELOPE = 320  # the same of one tensor, the longest names included
_FLOATS = ("FP16", "BF16", "FP32", "FP64")
_ITEM_SIZES = {name: dtype.itemsize for name, dtype in DATATYPES.items() if dtype.kind != "O"} | {"BF16": 2}


@dataclass(frozen=True)
class Asked:
    """A tap under the name that the answer carries."""

    name: str
    tap: Tap


def resolve(manifest: Manifest, patterns: Sequence[str], field: str, settings: ModelSettings) -> list[Asked]:
    """Return the taps that `patterns` (`glob[@reducer]`, without prefix) select, in the order asked, none twice.

    Raises InvalidArgument for an unknown layer (with the nearest), one that can't be tapped (with the reason), an
    unknown reducer, one that the model's `settings` do not allow there, and more layers than they allow. `field` is
    the path of the patterns in the request; `{}` in it stands for the position.
    """
    found: dict[Tap, Asked] = {}
    if len(patterns) > MAX_PATTERNS:
        raise InvalidArgument(
            f"{len(patterns)} layers are asked for, at most {MAX_PATTERNS} may be", field=field.format(0)
        )
    for position, pattern in enumerate(patterns):
        if len(pattern) > MAX_PATTERN_LENGTH:
            raise InvalidArgument(
                f"a layer pattern of {len(pattern)} characters; at most {MAX_PATTERN_LENGTH} may be",
                field=field.format(position),
            )
        for tap in _taps(manifest, pattern, field.format(position), settings):
            suffix = "" if tap.reducer == "none" else f"@{tap.reducer}"
            found.setdefault(tap, Asked(f"{tap.layer}{suffix}", tap))
        check_number(len(found), settings, field.format(position))
    return list(found.values())


def check_number(taps: int, settings: ModelSettings, field: str) -> None:
    """Raise InvalidArgument when so many layers are more than one request may ask for."""
    if taps > settings.max_taps:
        raise InvalidArgument(
            f"{taps} layers are asked for, this model gives at most {settings.max_taps} to one request; "
            "ask for fewer, or in several requests",
            field=field,
        )


def _taps(manifest: Manifest, pattern: str, field: str, settings: ModelSettings) -> list[Tap]:
    if pattern.count("@") > MAX_REDUCERS:
        raise InvalidArgument(
            f"layer {quoted(pattern)}: {pattern.count('@')} reducers; at most {MAX_REDUCERS} may follow each other",
            field=field,
        )
    try:
        glob, reducer = split_tap(pattern)
        names = set(match_layers(glob, manifest.layers_by_path))
    except ValueError as error:
        raise InvalidArgument(f"layer {quoted(pattern)}: {str(error)[:512]}", field=field) from error
    if not names:
        hint = nearest(glob, manifest.layers_by_path) or "; ListLayers names them all"
        raise InvalidArgument(f"model {manifest.name!r} has no layer {quoted(glob)}{hint}", field=field)
    layers = [layer for layer in manifest.layers if layer.path in names]
    available = [layer for layer in layers if layer.available]
    if not available:
        raise InvalidArgument(f"layer {layers[0].path!r} can't be tapped: {layers[0].reason}", field=field)
    for layer in available:
        _check_reducer(layer, reducer, field)
        if settings.features == "pooled" and not pools(layer.shape, reducer):
            raise InvalidArgument(
                f"layer {layer.path!r} of shape {list(layer.shape)}: {POOLED_ONLY}; ask for {layer.path}@mean",
                field=field,
            )
    return [Tap(layer.path, reducer) for layer in available]


def _check_reducer(layer: LayerSpec, reducer: str, field: str) -> None:
    try:
        reduced_shape([max(size, 1) for size in layer.shape], reducer)
    except ReducerError as error:
        raise InvalidArgument(f"layer {layer.path!r}: {error}", field=field) from error


def answer_bytes(
    manifest: Manifest, taps: Sequence[Tap], rows: int, length: int | None, outputs: Sequence[str] = ()
) -> int:
    """Return how many bytes the tapped values, and the outputs, of `rows` rows take.

    `length` is the size of dynamic dimensions; InvalidArgument when a reducer doesn't fit a layer of that length.
    """
    total = 0
    for tap in taps:
        layer = manifest.layers_by_path[tap.layer]
        try:
            shape = reduced_shape(sizes(layer.shape, rows, length), tap.reducer)
        except ReducerError as error:  # a length at which the reducer no longer fits
            raise InvalidArgument(f"layer {layer.path!r}: {error}") from error
        total += math.prod(shape) * _ITEM_SIZES[reduced_datatype(layer, tap)]
    for spec in manifest.outputs:
        if spec.name in outputs:
            total += math.prod(sizes(spec.shape, rows, length)) * _ITEM_SIZES.get(spec.datatype, 1)
    return total


def sizes(shape: Sequence[int], rows: int, length: int | None) -> list[int]:
    """Return `shape` with the request's own sizes for the batch and the dynamic dimensions."""
    return [rows, *((length or 1) if size == -1 else size for size in shape[1:])]


def reduced_datatype(layer: LayerSpec, tap: Tap) -> str:
    """Return the datatype of a layer's values after the tap's reducers."""
    datatype = layer.datatype
    for reducer in tap.reducer.split("@"):
        if reducer == "fp16":
            datatype = "FP16"
        elif gives_floats(reducer) and datatype not in _FLOATS:
            datatype = "FP32"
    return datatype


def check_size(
    manifest: Manifest, taps: Sequence[Tap], rows: int, length: int | None, limit: int, outputs: Sequence[str] = ()
) -> None:
    """Raise ResourceExhausted, before anything is allocated, when the values asked for would not fit into a message."""
    size = answer_bytes(manifest, taps, rows, length, outputs) + max(ENVELOPE, len(taps) * _TAP_ENVELOPE)
    if size > limit:
        stream = ", or take the layers in parts (ExtractStream)" if taps else ""
        raise ResourceExhausted(
            f"the values asked for take {size:,} bytes for {rows} rows, an answer holds {limit:,}; "
            f"send fewer rows, fewer layers, or reduce on the server ({', '.join(REDUCERS[1:4])}){stream}"
        )


def check_answer(size: int, limit: int, cure: str) -> None:
    """Raise ResourceExhausted for an answer of so many bytes, serialised, that no message holds; `cure` is the fix."""
    if size > limit:
        raise ResourceExhausted(f"the answer takes {size:,} bytes, a message holds {limit:,}; {cure}")


def check_feature_bytes(
    manifest: Manifest, taps: Sequence[Tap], rows: int, length: int | None, settings: ModelSettings
) -> None:
    """Raise ResourceExhausted when layers' values are more than one request may ask for, however they are sent."""
    size, limit = answer_bytes(manifest, taps, rows, length), settings.max_feature_bytes
    if size > limit:
        raise ResourceExhausted(
            f"the layers asked for take {size:,} bytes for {rows} rows, model {manifest.name!r} gives at most "
            f"{limit:,} to one request; send fewer rows, fewer layers, or reduce on the server "
            f"({', '.join(REDUCERS[1:4])})"
        )


def near(name: str, known: Sequence[str]) -> str:
    """Return a hint with the nearest known names, or with all of them when none is near."""
    close = difflib.get_close_matches(name[:128], known, n=3)  # takes long for a long name
    return f"nearest: {', '.join(close)}" if close else f"known: {', '.join(known[:10])}"
