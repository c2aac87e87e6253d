"""What calls return, besides arrays."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """An input or output. -1 in `shape` is any size; dimension 0 is the batch."""

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ModelMetadata:
    """A model as the server describes it. `preprocessing` and `labels` are empty for servers that do not send them."""

    name: str
    versions: tuple[str, ...]
    platform: str
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    labels: tuple[str, ...]
    preprocessing: Mapping[str, Any] | None
    description: str
    properties: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """One version in the server's repository. `reason` says why it is not READY, or has no layers to give."""

    name: str
    version: str
    state: str
    reason: str


@dataclass(frozen=True, slots=True)
class LayerInfo:
    """One layer of a model. `shape` has -1 for the batch and other sizes that depend on the input."""

    path: str
    type: str
    datatype: str
    shape: tuple[int, ...]
    order: int
    parameters: int
    available: bool
    reason: str
