"""The asyncio client: the operations of `Client`, awaited."""
# ruff: noqa: ASYNC109 - a timeout here is a gRPC deadline, which reaches the server; asyncio.timeout would be local

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import Any, Self, Unpack, overload

import grpc

from layercast.client.carrier_aio import AsyncCarrier
from layercast.client.connection import DEFAULT_MAX_MESSAGE_BYTES, DEFAULT_TIMEOUT, DEFAULT_URL, Connection
from layercast.client.edits import Edit
from layercast.client.explaining import Targets
from layercast.client.many import DEFAULT_IN_FLIGHT, Errors, check_items
from layercast.client.operations import Operations
from layercast.client.question import Outputs
from layercast.client.security import File, authorization, channel_credentials
from layercast.client.streams import AsyncItems
from layercast.client.translation import Inputs
from layercast.client.types import ExplainOptions, Explanation, LayerInfo, ModelInfo, ModelMetadata
from layercast.proto.codec import AnyArray


class AsyncClient:
    """`Client` for asyncio: the same arguments and methods, awaited. Belongs to the event loop of its first call.

    async with AsyncClient("localhost:8001") as client:
        answers = await asyncio.gather(*(client.predict("mnist", image) for image in images))
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        timeout: float | None = DEFAULT_TIMEOUT,
        max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
        tls: bool = False,
        ca: File | None = None,
        certificate: File | None = None,
        key: File | None = None,
        token: str | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        credentials = credentials or channel_credentials(tls, ca, certificate, key)
        sent = {**authorization(token), **(headers or {})}
        self._operations = Operations()
        self._carrier = AsyncCarrier(Connection(url, timeout, max_message_bytes, credentials, sent), self._operations)

    @overload
    async def predict(
        self,
        model: str,
        inputs: Inputs,
        *,
        version: str = ...,
        outputs: str,
        timeout: float | None = ...,
        id: str = ...,
    ) -> AnyArray: ...
    @overload
    async def predict(
        self,
        model: str,
        inputs: Inputs,
        *,
        version: str = ...,
        outputs: list[str] | tuple[str, ...],
        timeout: float | None = ...,
        id: str = ...,
    ) -> dict[str, AnyArray]: ...
    @overload
    async def predict(
        self,
        model: str,
        inputs: Inputs,
        *,
        version: str = ...,
        outputs: None = ...,
        timeout: float | None = ...,
        id: str = ...,
    ) -> Any: ...
    async def predict(
        self,
        model: str,
        inputs: Inputs,
        *,
        version: str = "",
        outputs: Outputs = None,
        timeout: float | None = None,
        id: str = "",
    ) -> AnyArray | dict[str, AnyArray]:
        """See `Client.predict`."""
        return await self._carrier.run(self._operations.predict(model, inputs, version, outputs, id), timeout)

    def predict_many(
        self,
        model: str,
        items: AsyncItems,
        *,
        version: str = "",
        outputs: Outputs = None,
        errors: Errors = "raise",
        in_flight: int = DEFAULT_IN_FLIGHT,
        timeout: float | None = None,
    ) -> AsyncGenerator[Any, None]:
        """See `Client.predict_many`. `items` may be an asynchronous iterable too; a task beside the caller takes them.

        `contextlib.aclosing` closes the stream where the loop is left early.
        """
        check_items(items, errors, in_flight)
        steps = self._operations.question(model, version, outputs)
        return self._carrier.many(items, steps, errors, in_flight, timeout)

    async def features(
        self,
        model: str,
        inputs: Inputs,
        layers: str | Sequence[str],
        *,
        reduce: str | None = None,
        outputs: str | Sequence[str] | None = None,
        version: str = "",
        timeout: float | None = None,
        id: str = "",
    ) -> dict[str, AnyArray]:
        """See `Client.features`."""
        steps = self._operations.features(model, inputs, layers, reduce, outputs, version, id)
        return await self._carrier.run(steps, timeout)

    async def stream_features(
        self,
        model: str,
        inputs: Inputs,
        layers: str | Sequence[str],
        *,
        reduce: str | None = None,
        outputs: str | Sequence[str] | None = None,
        version: str = "",
        chunk_bytes: int = 0,
        timeout: float | None = None,
        id: str = "",
    ) -> AsyncGenerator[dict[str, AnyArray], None]:
        """See `Client.stream_features`."""
        steps = self._operations.stream_features(model, inputs, layers, reduce, outputs, version, chunk_bytes, id)
        async with aclosing(self._carrier.stream(model, steps, timeout)) as parts:
            async for part in parts:
                yield part

    async def steer(
        self,
        model: str,
        inputs: Inputs,
        edits: Edit | Sequence[Edit],
        *,
        outputs: str | Sequence[str] | None = None,
        layers: str | Sequence[str] = (),
        reduce: str | None = None,
        version: str = "",
        timeout: float | None = None,
        id: str = "",
    ) -> dict[str, AnyArray]:
        """See `Client.steer`."""
        steps = self._operations.steer(model, inputs, edits, outputs, layers, reduce, version, id)
        return await self._carrier.run(steps, timeout)

    async def explain(
        self,
        model: str,
        inputs: Inputs,
        method: str = "integrated-gradients",
        targets: Targets = None,
        *,
        output: str | None = None,
        input: str | None = None,
        version: str = "",
        timeout: float | None = None,
        id: str = "",
        **options: Unpack[ExplainOptions],
    ) -> Explanation:
        """See `Client.explain`."""
        named = output, input
        steps = self._operations.explain(model, inputs, method, targets, named, version, id, options)
        return await self._carrier.run(steps, timeout)

    async def layers(
        self, model: str, pattern: str = "*", *, version: str = "", timeout: float | None = None
    ) -> list[LayerInfo]:
        """See `Client.layers`."""
        return await self._carrier.run(self._operations.layers(model, pattern, version), timeout)

    async def models(self, *, timeout: float | None = None) -> list[ModelInfo]:
        """See `Client.models`."""
        return await self._carrier.run(self._operations.models(), timeout)

    async def metadata(self, model: str, *, version: str = "", timeout: float | None = None) -> ModelMetadata:
        """See `Client.metadata`."""
        return await self._carrier.run(self._operations.metadata(model, version), timeout)

    async def is_live(self, *, timeout: float | None = None) -> bool:
        """See `Client.is_live`."""
        return await self._carrier.run(self._operations.is_live(), timeout)

    async def is_ready(self, *, timeout: float | None = None) -> bool:
        """See `Client.is_ready`."""
        return await self._carrier.run(self._operations.is_ready(), timeout)

    async def is_model_ready(self, model: str, *, version: str = "", timeout: float | None = None) -> bool:
        """See `Client.is_model_ready`."""
        return await self._carrier.run(self._operations.is_model_ready(model, version), timeout)

    async def close(self) -> None:
        """Close the connection; calls in flight are cancelled. The client cannot be used afterwards."""
        await self._carrier.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()
