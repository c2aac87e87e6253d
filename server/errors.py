"""Errors that a caller may see. Each carries its gRPC status; `transport.status` turns it into a reply.

All of them are expected: they mean that the request, its timing or the server's state is not right. Any other
exception is a bug and reaches the caller as INTERNAL with an id, its text only in the log.
"""

from typing import ClassVar

import grpc


class ServingError(Exception):
    """A request can't be answered; `message` says why and what would help.

    `field` is the path of the offending part of the request, as in `inputs[0].shape`. `retry_after` is in seconds.
    """

    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.INTERNAL

    def __init__(self, message: str, *, field: str = "", retry_after: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.retry_after = retry_after


class InvalidArgument(ServingError):
    """The request contradicts the model's description or the protocol."""

    code = grpc.StatusCode.INVALID_ARGUMENT


class NotFound(ServingError):
    """There is no such model or version."""

    code = grpc.StatusCode.NOT_FOUND


class Unavailable(ServingError):
    """Not now: the model is loading, the queue is full, or the server is shutting down. Worth a retry."""

    code = grpc.StatusCode.UNAVAILABLE


class ResourceExhausted(ServingError):
    """The answer, or the memory it takes, is over a limit. A retry will not help; a smaller request will."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED


class Unauthenticated(ServingError):
    """The caller has not said who it is, or with a token that is not known here."""

    code = grpc.StatusCode.UNAUTHENTICATED


class PermissionDenied(ServingError):
    """The caller may not do this."""

    code = grpc.StatusCode.PERMISSION_DENIED


class DeadlineExceeded(ServingError):
    """The caller's deadline passed before its rows ran."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED


class Unimplemented(ServingError):
    """The protocol knows this, the server does not do it."""

    code = grpc.StatusCode.UNIMPLEMENTED


class ModelFailed(ServingError):
    """The model itself raised, or broke its contract (wrong number of rows, wrong dtype)."""

    code = grpc.StatusCode.INTERNAL


class StartError(Exception):
    """The server can't start; the text is one line for the operator."""
