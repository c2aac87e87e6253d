"""Carries out, one RPC after the other, what the operations of `Client` want."""

from collections.abc import Generator, Iterator
from functools import partial
from typing import Any

import grpc

from layercast.client.connection import Connection, Deadline
from layercast.client.errors import LayercastError, from_status
from layercast.client.joining import joined
from layercast.client.many import METHOD, Errors, Many
from layercast.client.operations import Call, Operations, Outcome, Result, Steps
from layercast.client.question import Question
from layercast.client.streams import Stream, results
from layercast.client.translation import Inputs
from layercast.client.types import ModelMetadata
from layercast.proto.codec import AnyArray
from layercast.proto.rpc import FEATURES, INFERENCE


class Carrier:
    """Carries out steps over a channel of its own. Safe to share between threads."""

    def __init__(self, connection: Connection, operations: Operations) -> None:
        self._connection = connection
        self._operations = operations
        self._channel = self._open()
        self._closed = False
        self._calls = {
            method.path: self._channel.unary_unary(
                method.path,
                request_serializer=method.request.SerializeToString,
                response_deserializer=method.response.FromString,
            )
            for method in (*INFERENCE.values(), *FEATURES.values())
            if method.kind == "unary"
        }

    def run(self, steps: Steps[Result], timeout: float | None) -> Result:
        """Carry out the steps, within `timeout` all of them, and return what they return."""
        deadline = self._connection.deadline(timeout)
        try:
            call = next(steps)
            while True:
                call = steps.send(self._outcome(call, deadline))
        except StopIteration as done:
            result: Result = done.value
            return result

    def stream(
        self, model: str, steps: Steps[tuple[Call, ModelMetadata]], timeout: float | None
    ) -> Generator[dict[str, AnyArray], None, None]:
        """Carry out the steps, and then the RPC that they return, whose answers are joined."""
        deadline = self._connection.deadline(timeout)
        call, metadata = self.run(steps, timeout)
        method, responses = call.method, None
        if refusal := self._refusal(call):
            raise refusal
        try:
            opened = self._channel.unary_stream(
                method.path, method.request.SerializeToString, method.response.FromString
            )
            responses = opened(call.request, timeout=deadline.left, metadata=self._connection.metadata)
            yield from joined(model, responses)
        except grpc.RpcError as error:
            self._operations.forget(metadata)
            raise from_status(error, self._connection.url, deadline.timeout) from None
        finally:
            if responses is not None:
                responses.cancel()

    def many(
        self, items: Iterator[Inputs], steps: Steps[Question], errors: Errors, in_flight: int, timeout: float | None
    ) -> Generator[Any, None, None]:
        """Ask, over one stream, the question that the steps return of one item after the other."""
        many = Many(self._operations, self._connection, self.run(steps, timeout), errors, in_flight)
        if self._closed:
            raise LayercastError("this client is closed")
        call: Any = self._channel.stream_stream(METHOD.path, None, METHOD.response.FromString)
        stream = Stream(partial(call, metadata=self._connection.metadata))
        yield from results(stream, many, items, self._connection.deadline(timeout).timeout)

    def close(self) -> None:
        """Close the channel; calls in flight are cancelled."""
        self._closed = True
        self._channel.close()

    def _open(self) -> grpc.Channel:
        url, options, credentials = self._connection.url, self._connection.options, self._connection.credentials
        if credentials is None:
            return grpc.insecure_channel(url, options)
        return grpc.secure_channel(url, credentials, options)

    def _refusal(self, call: Call) -> LayercastError | None:
        """The error for a call that can't be sent, or None."""
        return LayercastError("this client is closed") if self._closed else self._connection.oversize(call.request)

    def _outcome(self, call: Call, deadline: Deadline) -> Outcome:
        if refusal := self._refusal(call):
            return refusal
        try:
            return self._calls[call.method.path](
                call.request, timeout=deadline.left, metadata=self._connection.metadata
            )
        except grpc.RpcError as error:
            return from_status(error, self._connection.url, deadline.timeout)
        except ValueError:
            if self._closed:  # by another thread, a moment ago
                return LayercastError("this client is closed")
            raise
