"""gRPC statuses as HTTP answers: the one table, and the error body `{"error": "..."}`."""

import math
from typing import Final

import grpc
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from layercast.server.errors import ServingError
from layercast.server.transport.status import reply

_CODES: Final = grpc.StatusCode
HTTP_STATUS: Final = {
    _CODES.OK: 200,
    _CODES.INVALID_ARGUMENT: 400,
    _CODES.FAILED_PRECONDITION: 400,
    _CODES.OUT_OF_RANGE: 400,
    _CODES.ALREADY_EXISTS: 400,
    _CODES.UNAUTHENTICATED: 401,
    _CODES.PERMISSION_DENIED: 403,
    _CODES.NOT_FOUND: 404,
    _CODES.ABORTED: 409,
    # What is exhausted is room for a message, so a smaller request helps and a retry (429) would not.
    _CODES.RESOURCE_EXHAUSTED: 413,
    _CODES.CANCELLED: 499,
    _CODES.UNKNOWN: 500,
    _CODES.INTERNAL: 500,
    _CODES.DATA_LOSS: 500,
    _CODES.UNIMPLEMENTED: 501,
    _CODES.UNAVAILABLE: 503,
    _CODES.DEADLINE_EXCEEDED: 504,
}
"""As Triton's HTTP front end answers, and for the statuses that it never has, as google.rpc.Code and nginx (499) do."""


def error_response(error: Exception, method: str) -> Response:
    """Return what the caller of `method` sees of `error`, which may be one of HTTP's own (404, 413)."""
    if isinstance(error, HTTPException):
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)
    failed = reply(error, method)
    headers = {}
    if failed.code is _CODES.UNAUTHENTICATED:
        headers["www-authenticate"] = "Bearer"
    if isinstance(error, ServingError) and error.retry_after is not None:
        headers["retry-after"] = str(math.ceil(error.retry_after))
    return JSONResponse({"error": failed.message}, HTTP_STATUS[failed.code], headers)


async def not_routed(request: Request, error: Exception) -> Response:
    """Answer a path or a method that no route takes; a handler for Starlette."""
    if isinstance(error, HTTPException) and error.status_code == 404:
        error = HTTPException(404, f"there is no {request.url.path[:128]!r} here; GET / lists what there is")
    elif isinstance(error, HTTPException) and error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        error = HTTPException(405, f"{request.method} is not possible here; use {allowed}", error.headers)
    return error_response(error, request.url.path)
