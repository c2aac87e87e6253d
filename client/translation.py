"""Between what callers write and what goes on the wire: inputs, taps, metadata, codec errors."""

import json
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from layercast.client.conversion import fit
from layercast.client.errors import InputWarning, InternalError, InvalidArgument
from layercast.client.types import ModelMetadata, TensorInfo
from layercast.proto.codec import AnyArray, CodecError, Tensor, datatype_of, named_tensor
from layercast.proto.messages import ModelMetadataResponse, NamedTensor

Inputs = ArrayLike | Mapping[str, ArrayLike]


def named_inputs(metadata: ModelMetadata, inputs: Inputs) -> list[Tensor]:
    """Name, datatype and fitted array of each input. A lone array belongs to a model's only input."""
    if not isinstance(inputs, Mapping):
        if len(metadata.inputs) != 1:
            names = ", ".join(repr(info.name) for info in metadata.inputs) or "unknown to the server"
            raise InvalidArgument(
                f"the inputs of model {metadata.name!r} are {names}: pass a dict of arrays by input name"
            )
        inputs = {metadata.inputs[0].name: inputs}
    return [_tensor(metadata, name, value) for name, value in inputs.items()]


def sent_inputs(metadata: ModelMetadata, inputs: Inputs) -> list[NamedTensor]:
    """The inputs as the requests of FeatureService carry them; InvalidArgument for what can't be encoded."""
    with encoding():
        return [named_tensor(*tensor) for tensor in named_inputs(metadata, inputs)]


def _tensor(metadata: ModelMetadata, name: str, value: ArrayLike) -> Tensor:
    declared = {info.name: info.datatype for info in metadata.inputs}
    if name in declared:
        return name, declared[name], fit(name, value, declared[name])
    if declared:
        names = ", ".join(map(repr, declared))
        raise InvalidArgument(f"model {metadata.name!r} has no input {name!r}; its inputs are {names}")
    # Some servers describe no inputs: the array's own type is the best guess.
    array = np.asarray(value)
    return name, datatype_of(array.dtype), array


def taps(layers: str | Sequence[str], reduce: str | None) -> list[str]:
    """Layer globs with the reducer appended to those that do not bring their own."""
    globs = [layers] if isinstance(layers, str) else layers
    return [glob if reduce is None or "@" in glob else f"{glob}@{reduce}" for glob in globs]


def only(arrays: dict[str, AnyArray], asked: str) -> AnyArray:
    """The answer to one output asked for by name."""
    if len(arrays) != 1:
        raise InvalidArgument(
            f"outputs={asked!r} matches {len(arrays)} outputs; pass a list to get all of them by name"
        )
    return next(iter(arrays.values()))


def metadata_of(response: ModelMetadataResponse) -> ModelMetadata:
    """The server's description of a model, with its JSON properties parsed."""
    properties = dict(response.properties)
    return ModelMetadata(
        name=response.name,
        versions=tuple(response.versions),
        platform=response.platform,
        inputs=tuple(TensorInfo(info.name, info.datatype, tuple(info.shape)) for info in response.inputs),
        outputs=tuple(TensorInfo(info.name, info.datatype, tuple(info.shape)) for info in response.outputs),
        labels=tuple(str(label) for label in _parsed(properties, "labels", list) or ()),
        preprocessing=_parsed(properties, "preprocessing", dict),
        description=properties.get("description", ""),
        properties=properties,
    )


def _parsed(properties: Mapping[str, str], name: str, kind: type) -> Any:
    """A JSON property, or None. Another server may use the same name for something else."""
    try:
        value = json.loads(properties.get(name, "null"))
    except ValueError:
        return None
    return value if isinstance(value, kind) else None


def pass_on(warning: str) -> None:
    """Warn of what the server says about the inputs, if it says anything, at the line that called this package."""
    if not warning:
        return
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals["__name__"].startswith("layercast.client"):
        level, frame = level + 1, frame.f_back
    warnings.warn(warning, InputWarning, stacklevel=level)


@contextmanager
def encoding() -> Iterator[None]:
    """What cannot be encoded is the caller's fault."""
    try:
        yield
    except CodecError as error:
        raise InvalidArgument(str(error)) from error


@contextmanager
def decoding(model: str) -> Iterator[None]:
    """What cannot be decoded is the server's fault."""
    try:
        yield
    except CodecError as error:
        raise InternalError(f"the answer of model {model!r} is malformed: {error}") from error
