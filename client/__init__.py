"""Python clients for Layercast and any other server of the Open Inference Protocol. No torch needed.

What is here is imported when it is first used: the program `layercast` shows its help without grpc and numpy.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from layercast.client.aio import AsyncClient
    from layercast.client.client import Client
    from layercast.client.edits import Edit
    from layercast.client.errors import (
        Cancelled,
        DeadlineExceeded,
        FailedPrecondition,
        InputWarning,
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
    from layercast.client.types import (
        ExplainOptions,
        Explanation,
        LayerInfo,
        ModelInfo,
        ModelMetadata,
        TensorInfo,
        Timing,
    )

__all__ = [
    "AsyncClient",
    "Cancelled",
    "Client",
    "DeadlineExceeded",
    "Edit",
    "ExplainOptions",
    "Explanation",
    "FailedPrecondition",
    "InputWarning",
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

_MODULES = ("errors", "types", "edits", "client", "aio")


def __getattr__(name: str) -> Any:
    if name in __all__:
        for module in _MODULES:
            found = getattr(importlib.import_module(f"{__name__}.{module}"), name, None)
            if found is not None:
                globals()[name] = found
                return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
