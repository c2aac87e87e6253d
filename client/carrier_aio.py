"""Carries out, awaiting one RPC after the other, what the operations of `AsyncClient` want."""
# ruff: noqa: ASYNC109 - a timeout here is a gRPC deadline, which reaches the server; asyncio.timeout would be local

from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from typing import Any

import grpc
import grpc.aio

from layercast.client.connection import Connection, Deadline
from layercast.client.errors import LayercastError, from_status
from layercast.client.joining import Joining
from layercast.client.many import METHOD, Errors, Many
from layercast.client.operations import Call, Operations, Outcome, Result, Steps
from layercast.client.question import Question
from layercast.client.streams import AsyncItems, results_async
from layercast.client.types import ModelMetadata
from layercast.proto.codec import AnyArray


class AsyncCarrier:
    """Carries out steps over a channel of its own, which belongs to the event loop of the first call."""

    def __init__(self, connection: Connection, operations: Operations) -> None:
        self._connection = connection
        self._operations = operations
        self._channel: grpc.aio.Channel | None = None
        self._closed = False

    async def run(self, steps: Steps[Result], timeout: float | None) -> Result:
        """Carry out the steps, within `timeout` all of them, and return what they return."""
        deadline = self._connection.deadline(timeout)
        try:
            call = next(steps)
            while True:
                call = steps.send(await self._outcome(call, deadline))
        except StopIteration as done:
            result: Result = done.value
            return result

    async def stream(
        self, model: str, steps: Steps[tuple[Call, ModelMetadata]], timeout: float | None
    ) -> AsyncGenerator[dict[str, AnyArray], None]:
        """Carry out the steps, and then the RPC that they return, whose answers are joined."""
        deadline = self._connection.deadline(timeout)
        call, metadata = await self.run(steps, timeout)
        method = call.method
        responses: Any = None
        joining = Joining(model)
        if refusal := self._refusal(call):
            raise refusal
        try:
            opened = self._opened().unary_stream(
                method.path, method.request.SerializeToString, method.response.FromString
            )
            responses = opened(call.request, timeout=deadline.left, metadata=self._connection.metadata)
            async for response in responses:
                if (arrays := joining.add(response)) is not None:
                    yield arrays
            joining.end()
        except grpc.aio.AioRpcError as error:
            self._operations.forget(metadata)
            raise from_status(error, self._connection.url, deadline.timeout) from None
        finally:
            if responses is not None:
                responses.cancel()

    async def many(
        self, items: AsyncItems, steps: Steps[Question], errors: Errors, in_flight: int, timeout: float | None
    ) -> AsyncGenerator[Any, None]:
        """Ask, over one stream, the question that the steps return of one item after the other."""
        many = Many(self._operations, self._connection, await self.run(steps, timeout), errors, in_flight)
        if self._closed:
            raise LayercastError("this client is closed")
        stream: Any = self._opened().stream_stream(METHOD.path, None, METHOD.response.FromString)
        open_call = partial(stream, metadata=self._connection.metadata)
        seconds = self._connection.deadline(timeout).timeout
        async with aclosing(results_async(open_call, many, items, seconds)) as answers:
            async for answer in answers:
                yield answer

    async def close(self) -> None:
        """Close the channel; calls in flight are cancelled."""
        self._closed = True
        if self._channel is not None:
            await self._channel.close()

    def _opened(self) -> grpc.aio.Channel:
        """The channel, made inside the running event loop, which it stays tied to."""
        if self._channel is None:
            url, options, credentials = self._connection.url, self._connection.options, self._connection.credentials
            if credentials is None:
                self._channel = grpc.aio.insecure_channel(url, options)
            else:
                self._channel = grpc.aio.secure_channel(url, credentials, options)
        return self._channel

    def _refusal(self, call: Call) -> LayercastError | None:
        """The error for a call that can't be sent, or None."""
        return LayercastError("this client is closed") if self._closed else self._connection.oversize(call.request)

    async def _outcome(self, call: Call, deadline: Deadline) -> Outcome:
        if refusal := self._refusal(call):
            return refusal
        method = call.method
        send = self._opened().unary_unary(method.path, method.request.SerializeToString, method.response.FromString)
        try:
            outcome: Outcome = await send(call.request, timeout=deadline.left, metadata=self._connection.metadata)
        except grpc.aio.AioRpcError as error:
            return from_status(error, self._connection.url, deadline.timeout)
        return outcome
