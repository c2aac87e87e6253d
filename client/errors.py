"""What a call may raise. Classes are named after the gRPC status that they stand for; the text is the server's own.

Expected: everything below, for a caller to handle. A ValueError or TypeError from this package means that the calling
code is wrong.
"""

from typing import Protocol

import grpc

START_HINT = "start one with `layercast serve`, or name another with url= (`--url` on the command line)"

# How gRPC's own library begins the text of an UNAVAILABLE that no server sent.
_UNREACHABLE = ("failed to connect to all addresses", "DNS resolution failed", "Name resolution failed")


class LayercastError(Exception):
    """A call failed. `code` is its gRPC status.

    `answered` is for `predict_many`: how many results came before, which is also the index of the item that failed.
    """

    code: grpc.StatusCode = grpc.StatusCode.UNKNOWN
    answered: int | None = None


class InputWarning(UserWarning):
    """The server answered, and has its doubts about the inputs: values outside what the model was trained on."""


class InputError(ValueError):
    """A file, array or text that does not fit the model. Raised before anything is sent."""


class InvalidArgument(LayercastError):
    """The request is wrong and will be wrong again: fix it."""

    code = grpc.StatusCode.INVALID_ARGUMENT


class NotFound(LayercastError):
    """No such model, version or layer."""

    code = grpc.StatusCode.NOT_FOUND


class DeadlineExceeded(LayercastError, TimeoutError):
    """No answer within the timeout."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED


class Unavailable(LayercastError):
    """The server cannot be reached, or cannot answer now (loading, full, shutting down): try again later."""

    code = grpc.StatusCode.UNAVAILABLE


class ResourceExhausted(LayercastError):
    """A limit is exceeded: message size, queue, response size."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED


class FailedPrecondition(LayercastError):
    """The server is not in the state that the call needs."""

    code = grpc.StatusCode.FAILED_PRECONDITION


class Unimplemented(LayercastError):
    """The server does not have this call; a feature call to a server that is not Layercast, for example."""

    code = grpc.StatusCode.UNIMPLEMENTED


class InternalError(LayercastError):
    """The model or the server failed. The id in the text is in the server's log."""

    code = grpc.StatusCode.INTERNAL


class Cancelled(LayercastError):
    """The call was cancelled."""

    code = grpc.StatusCode.CANCELLED


class PermissionDenied(LayercastError):
    """The caller may not do this."""

    code = grpc.StatusCode.PERMISSION_DENIED


class Unauthenticated(LayercastError):
    """The server does not know who is calling."""

    code = grpc.StatusCode.UNAUTHENTICATED


_BY_CODE: dict[grpc.StatusCode, type[LayercastError]] = {
    error.code: error
    for error in (
        InvalidArgument,
        NotFound,
        DeadlineExceeded,
        Unavailable,
        ResourceExhausted,
        FailedPrecondition,
        Unimplemented,
        InternalError,
        Cancelled,
        PermissionDenied,
        Unauthenticated,
    )
}


# What gRPC says of a connection that was made and then not used, and what stands behind it.
_CLOSED = "it closed the connection; it may want TLS (ca=, `--ca`), or a certificate of its callers"
_HANDSHAKES = {
    "CERTIFICATE_VERIFY_FAILED": "its certificate is not trusted here; name the authority with ca= (`--ca`)",
    "WRONG_VERSION_NUMBER": "it does not speak TLS; leave out tls, ca and certificate",
    "handshake failed": "the two could not agree on TLS",
    # Envoy's refusal comes after the handshake, as TLS 1.3 allows.
    "Unwrap failed": "it closed the connection; it wants a certificate of its callers, of an authority it trusts",
    "Socket closed": _CLOSED,
    "Connection reset by peer": _CLOSED,  # where our last words met a closed connection
}


class Status(Protocol):
    """What the errors of grpc and grpc.aio have in common."""

    def code(self) -> grpc.StatusCode:
        """The status."""

    def details(self) -> str | None:
        """The text that came with it."""


def from_status(status: Status, url: str, timeout: float | None) -> LayercastError:
    """The error for a failed call to `url`. Texts of the gRPC library itself, which name no cure, are replaced."""
    code = status.code()
    text = status.details() or code.name
    if code is grpc.StatusCode.UNAVAILABLE and text.startswith(_UNREACHABLE):
        text = _unreachable(text, url)
    elif code is grpc.StatusCode.DEADLINE_EXCEEDED and text == "Deadline Exceeded" and timeout is not None:
        text = f"no answer from {url} within {timeout:g} s; pass a longer timeout"
    elif code is grpc.StatusCode.RESOURCE_EXHAUSTED and "CLIENT: Received message larger" in text:
        text = f"the answer is larger than this client accepts; pass a larger max_message_bytes ({text})"
    return of_code(code, text)


def of_code(code: grpc.StatusCode, text: str) -> LayercastError:
    """The error that stands for a status."""
    error = _BY_CODE.get(code, LayercastError)(text)
    error.code = code
    return error


def _unreachable(text: str, url: str) -> str:
    for found, reason in _HANDSHAKES.items():
        if found in text:
            return f"no call to {url} is possible: {reason}"
    return f"no server answers at {url}; {START_HINT}"
