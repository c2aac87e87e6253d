"""What calls return, besides arrays."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from layercast.proto.codec import AnyArray


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


class ExplainOptions(TypedDict, total=False):
    """Options of the methods of `Client.explain`. One that the method does not have is refused by the server."""

    layer: str
    steps: int
    baseline: float
    samples: int
    noise: float
    seed: int
    window: int | Sequence[int]
    stride: int | Sequence[int]
    upsample: bool
    pool: str
    residual: float


@dataclass(frozen=True, slots=True)
class Timing:
    """What a request cost on the server: seconds in the queue and in the model, and the rows that ran together."""

    queue: float
    compute: float
    batch_rows: int


@dataclass(frozen=True, slots=True, eq=False)
class Explanation:
    """How much each value of the inputs counts for what the model answers.

    `attributions` is float32 (float64 of a model that computes in it): of the input's shape; [N, T] for token ids, zero
    at padding; [N, H, W] for gradcam. `targets`, int64 [N], is the class index that each row was explained for.
    `delta`, float64 [N], is the completeness error of integrated gradients: how far the sum of a row's attributions is
    from the difference of its scores at the input and at the baseline; None for other methods. `version` is the
    version that ran. `warning` says what you should know of your inputs, for example values that the model was not
    trained on; it is empty when there is nothing.
    """

    attributions: AnyArray
    targets: NDArray[np.int64]
    delta: NDArray[np.float64] | None
    timing: Timing
    version: str
    warning: str
