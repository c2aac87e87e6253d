"""The one place where an exception becomes what a caller sees: a status code, a text, and typed details."""

import logging
import uuid
from dataclasses import dataclass

import grpc
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import BadRequest, RetryInfo
from google.rpc.status_pb2 import Status

from layercast.server.errors import ServingError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reply:
    """A failed call's status; `details` is the serialised google.rpc.Status for the trailer grpc-status-details-bin."""

    code: grpc.StatusCode
    message: str
    details: bytes


def reply(error: Exception, method: str) -> Reply:
    """Return what the caller of `method` sees of `error`. A bug shows only an id; its traceback goes to the log."""
    if isinstance(error, ServingError):
        return Reply(error.code, error.message, _details(error))
    identifier = uuid.uuid4().hex[:12]
    logger.error("error %s in %s", identifier, method, exc_info=error)
    message = f"internal error {identifier}; the server's log has the cause under this id"
    return Reply(grpc.StatusCode.INTERNAL, message, b"")


def _details(error: ServingError) -> bytes:
    status = Status(code=error.code.value[0], message=error.message)
    if error.field:
        violation = BadRequest.FieldViolation(field=error.field, description=error.message)
        status.details.add().Pack(BadRequest(field_violations=[violation]))
    if error.retry_after is not None:
        delay = Duration()
        delay.FromNanoseconds(int(error.retry_after * 1e9))
        status.details.add().Pack(RetryInfo(retry_delay=delay))
    return status.SerializeToString() if status.details else b""
