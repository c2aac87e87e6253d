"""Python clients for Layercast and any other server of the Open Inference Protocol. No torch needed."""

from layercast.client.aio import AsyncClient
from layercast.client.client import Client
from layercast.client.errors import (
    Cancelled,
    DeadlineExceeded,
    FailedPrecondition,
    InternalError,
    InvalidArgument,
    LayercastError,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
    Unimplemented,
)
from layercast.client.types import ExplainOptions, Explanation, LayerInfo, ModelInfo, ModelMetadata, TensorInfo, Timing

__all__ = [
    "AsyncClient",
    "Cancelled",
    "Client",
    "DeadlineExceeded",
    "ExplainOptions",
    "Explanation",
    "FailedPrecondition",
    "InternalError",
    "InvalidArgument",
    "LayerInfo",
    "LayercastError",
    "ModelInfo",
    "ModelMetadata",
    "NotFound",
    "PermissionDenied",
    "ResourceExhausted",
    "TensorInfo",
    "Timing",
    "Unauthenticated",
    "Unavailable",
    "Unimplemented",
]
