"""What the caller of the running request may do. The transport grants, the services ask; without tokens all is free."""

from collections.abc import Collection
from contextvars import ContextVar
from typing import Final

from layercast.server.errors import PermissionDenied

METADATA: Final = "metadata"
PREDICT: Final = "predict"
FEATURES: Final = "features"
ADMIN: Final = "admin"
SCOPES: Final = (METADATA, PREDICT, FEATURES, ADMIN)

_granted: ContextVar[Collection[str] | None] = ContextVar("granted", default=None)


def grant(scopes: Collection[str] | None) -> None:
    """Let the current task, and those it starts, do what `scopes` name; None for everything."""
    _granted.set(scopes)


def has(scope: str) -> bool:
    """Tell whether the caller has this scope."""
    granted = _granted.get()
    return granted is None or scope in granted


def require(*any_of: str, to: str) -> None:
    """Raise PermissionDenied unless the caller has one of the scopes, which it takes `to` do something."""
    granted = _granted.get()
    if granted is not None and not set(any_of) & set(granted):
        raise PermissionDenied(f"the token's scopes do not allow {to}; it takes {' or '.join(any_of)}")
