"""What `predict_many` does, without input and output: what to send, what is in flight, what each answer means."""

from collections import deque
from collections.abc import Mapping
from typing import Any, Literal

import grpc

from layercast.client.connection import Connection
from layercast.client.errors import (
    DeadlineExceeded,
    InternalError,
    InvalidArgument,
    LayercastError,
    NotFound,
    Status,
    from_status,
    of_code,
)
from layercast.client.operations import Operations
from layercast.client.question import Question
from layercast.client.translation import Inputs
from layercast.proto.messages import ModelStreamInferResponse
from layercast.proto.rpc import INFERENCE

Errors = Literal["raise", "return"]

METHOD = INFERENCE["ModelStreamInfer"]
DEFAULT_IN_FLIGHT = 128
"""Two full batches of a server as it comes: one runs while the next is sent."""


def check_items(items: object, errors: str, in_flight: int) -> None:
    """Raise ValueError for arguments that `predict_many` can make nothing of."""
    if isinstance(items, Mapping):
        raise ValueError("items is one dict of inputs; pass an iterable of them, or use predict")
    if errors not in ("raise", "return"):
        raise ValueError(f"errors is {errors!r}; it must be 'raise' or 'return'")
    if in_flight < 1:
        raise ValueError(f"in_flight is {in_flight}; it must be at least 1")


class Many:
    """The items of one `predict_many`, in order, from their encoding to their results.

    What is in flight is bounded by the number of items and, as `max_message_bytes`, by their size together.
    """

    def __init__(
        self, operations: Operations, connection: Connection, question: Question, errors: Errors, in_flight: int
    ) -> None:
        self._operations = operations
        self._connection = connection
        self._question = question
        self._errors = errors
        self._limit = in_flight
        # In order: the size of each request on its way, or the error that stands for one that was not sent.
        self._waiting: deque[int | LayercastError] = deque()
        self._bytes = 0
        self._given = False
        self._taken = 0
        self._answered = 0

    @property
    def has_room(self) -> bool:
        """Whether another item may be taken in."""
        return len(self._waiting) < self._limit and self._bytes < self._connection.max_message_bytes

    @property
    def unsent(self) -> LayercastError | None:
        """The error of the oldest item in flight, if that could not be sent."""
        oldest = self._waiting[0] if self._waiting else None
        return oldest if isinstance(oldest, LayercastError) else None

    @property
    def expects(self) -> bool:
        """Whether the next result is still to come from the server."""
        return bool(self._waiting) and self.unsent is None

    def advance(self) -> None:
        """The caller is back for the next result: the item of the one before is in flight no longer."""
        if self._given:
            size = self._waiting.popleft()
            self._bytes -= size if isinstance(size, int) else 0
            self._given = False

    def request(self, inputs: Inputs) -> bytes | None:
        """The request for the next item; None when it can't be sent, which is then its result."""
        identifier = str(self._taken)
        self._taken += 1
        try:
            request = self._question.request(inputs, identifier)
            oversize = self._connection.oversize(request)
            if oversize is not None:
                raise oversize
        except LayercastError as error:
            self._waiting.append(error)
            return None
        message = request.SerializeToString()
        self._waiting.append(len(message))
        self._bytes += len(message)
        return message

    def result(self, answer: ModelStreamInferResponse) -> Any:
        """The result of the oldest item in flight, whose answer came."""
        response, due = answer.infer_response, str(self._answered)
        # Another server's errors may come without their request's id.
        if not self.expects or response.id not in ((due, "") if answer.error_message else (due,)):
            raise self.ended(InternalError(f"the server answered request {response.id!r} where {due} was due"))
        if answer.error_message:
            return self.failed(_error_of(answer))
        try:
            result = self._question.result(response)
        except LayercastError as malformed:
            return self.failed(malformed)
        self._given = True
        self._answered += 1
        return result

    def failed(self, error: LayercastError) -> LayercastError:
        """The result of the oldest item in flight, which is an error; raised unless errors are returned."""
        error.answered = self._answered
        if isinstance(error, (InvalidArgument, NotFound)):
            self._operations.forget(self._question.metadata)
        if self._errors == "raise":
            raised = of_code(error.code, f"item {self._answered}: {error}")
            raised.answered = self._answered
            raise raised from error
        self._given = True
        self._answered += 1
        return error

    def broken(self, status: Status) -> LayercastError:
        """The error for a stream that failed before its end."""
        return self.ended(from_status(status, self._connection.url, None))

    def cut_short(self) -> LayercastError:
        """The error for a stream that the server ended as if all were answered."""
        return self.ended(InternalError("the server ended it without an error"))

    def late(self, seconds: float | None) -> LayercastError:
        """The error for an answer that did not come in time."""
        text = f"no answer from {self._connection.url} within {seconds:g} s; pass a longer timeout"
        return self.ended(DeadlineExceeded(text))

    def ended(self, error: LayercastError) -> LayercastError:
        """`error`, with how far the stream came before it."""
        text = f"the stream ended after {self._answered} answers, with {len(self._waiting)} items in flight: {error}"
        ended = of_code(error.code, text)
        ended.answered = self._answered
        return ended


def _error_of(answer: ModelStreamInferResponse) -> LayercastError:
    """The error inside a stream. Layercast names its status; Triton has only a text."""
    name = answer.infer_response.parameters["error_code"].string_param
    known = grpc.StatusCode.__members__.get(name, grpc.StatusCode.UNKNOWN)
    return of_code(known, answer.error_message)
