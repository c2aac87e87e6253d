"""Errors that a caller may see. Each carries its gRPC status; `transport.status` turns it into a reply.

All of them are expected: they mean that the request, its timing or the server's state is not right. Any other
exception is a bug; `expected` turns it into INTERNAL with an id, its text only in the log.
"""

import asyncio
import logging
import uuid
from typing import ClassVar, Final

import grpc

from layercast.server.text import fit

logger = logging.getLogger(__name__)

MAX_MESSAGE: Final = 1024
"""Bytes of an error text, which travels in a header; what a caller sent never comes back at length."""
_MAX_FIELD: Final = 128


class ServingError(Exception):
    """A request can't be answered; `message` says why and what would help.

    `field` is the path of the offending part of the request, as in `inputs[0].shape`. `retry_after` is in seconds,
    None where trying again will not help. Text and path are cut and escaped: both may hold a stranger's names.
    """

    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.INTERNAL
    retry: ClassVar[float | None] = None

    def __init__(self, message: str, *, field: str = "", retry_after: float | None = None) -> None:
        self.message = fit(message, MAX_MESSAGE)
        super().__init__(self.message)
        self.field = fit(field, _MAX_FIELD)
        self.retry_after = self.retry if retry_after is None else retry_after


class InvalidArgument(ServingError):
    """The request contradicts the model's description or the protocol."""

    code = grpc.StatusCode.INVALID_ARGUMENT


class NotFound(ServingError):
    """There is no such model or version."""

    code = grpc.StatusCode.NOT_FOUND


class Unavailable(ServingError):
    """Not now: the model is loading, the queue is full, or the server is shutting down. Worth a retry."""

    code = grpc.StatusCode.UNAVAILABLE
    retry = 1.0


class Evicted(Unavailable):
    """The queue is full, and the rows made room for another caller's."""


class ResourceExhausted(ServingError):
    """The answer, or the memory it takes, is over a limit. A retry will not help; a smaller request will."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED


class OutOfMemory(ResourceExhausted):
    """Running the rows takes more memory than there is; fewer of them may fit."""


class Unauthenticated(ServingError):
    """The caller has not said who it is, or with a token that is not known here."""

    code = grpc.StatusCode.UNAUTHENTICATED


class PermissionDenied(ServingError):
    """The protocol knows this, and the operator lets nobody, or not this caller, do it."""

    code = grpc.StatusCode.PERMISSION_DENIED


class DeadlineExceeded(ServingError):
    """The caller's deadline passed before its rows ran."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED


class DeadlineCancelled(asyncio.CancelledError):
    """The transport cancelled the call, and it did so because the caller's deadline had passed."""


class Unimplemented(ServingError):
    """The protocol knows this, the server does not do it."""

    code = grpc.StatusCode.UNIMPLEMENTED


class ModelFailed(ServingError):
    """The model itself raised, or broke its contract (wrong number of rows, wrong dtype)."""

    code = grpc.StatusCode.INTERNAL


class Bug(ServingError):
    """The server itself failed; the text is an id under which the log has the traceback."""


def expected(error: Exception, where: str) -> ServingError:
    """Return `error` if a caller may see it, else a Bug in its place, after logging what happened in `where`."""
    if isinstance(error, ServingError):
        return error
    identifier = uuid.uuid4().hex[:12]
    logger.error("error %s in %s", identifier, where, exc_info=error)
    return Bug(f"internal error {identifier}; the server's log has the cause under this id")


class StartError(Exception):
    """The server can't start; the text is one line for the operator."""
