"""The one place where an exception becomes what a gRPC caller sees: a status code, a text, and typed details."""

import functools
from dataclasses import dataclass

import grpc
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import BadRequest, RetryInfo
from google.rpc.status_pb2 import Status

from layercast.server.errors import expected

_DETAILS = "grpc-status-details-bin"
# Read by gRPC's own retry (proposal A6): milliseconds to wait, a negative number means "do not retry".
_PUSHBACK = "grpc-retry-pushback-ms"
_RETRIED = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED)


@dataclass(frozen=True)
class Reply:
    """A failed call's status and its trailers: a serialised google.rpc.Status, and when to try again."""

    code: grpc.StatusCode
    message: str
    trailers: tuple[tuple[str, str | bytes], ...]


def reply(error: Exception, method: str) -> Reply:
    """Return what the caller of `method` sees of `error`. A bug shows only an id; its traceback goes to the log."""
    shown = expected(error, method)
    trailers: list[tuple[str, str | bytes]] = []
    if details := _details(shown.code, shown.message, shown.field, shown.retry_after):
        trailers.append((_DETAILS, details))
    if shown.code in _RETRIED:
        trailers.append((_PUSHBACK, "-1" if shown.retry_after is None else str(int(shown.retry_after * 1000))))
    return Reply(shown.code, shown.message, tuple(trailers))


# A full queue refuses many requests with the same words, when there is least time to put them into messages.
@functools.lru_cache(maxsize=256)
def _details(code: grpc.StatusCode, message: str, field: str, retry_after: float | None) -> bytes:
    status = Status(code=code.value[0], message=message)
    if field or code is grpc.StatusCode.INVALID_ARGUMENT:
        violation = BadRequest.FieldViolation(field=field, description=message)
        status.details.add().Pack(BadRequest(field_violations=[violation]))
    if retry_after is not None:
        delay = Duration()
        delay.FromNanoseconds(int(retry_after * 1e9))
        status.details.add().Pack(RetryInfo(retry_delay=delay))
    return status.SerializeToString() if status.details else b""
