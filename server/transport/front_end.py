"""What every front end answers: our two services, health, reflection, and an answer to all other RPCs."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import grpc
from google.protobuf.message import Message

from layercast.proto.rpc import FEATURES, FEATURES_SERVICE, INFERENCE, INFERENCE_SERVICE, Method
from layercast.server.errors import Unimplemented
from layercast.server.metrics import Metrics
from layercast.server.service.call import Call, method_of
from layercast.server.transport.calls import Handler, ServerStreamRpc, UnaryRpc
from layercast.server.transport.counted import Counted
from layercast.server.transport.short_call import Begin
from layercast.server.transport.standard import HandlerTaker, UnknownRpcs, add_health, add_reflection
from layercast.server.transport.streams import StreamRpc


class FrontEnd(ABC):
    """The handlers, registered on `server`, and what they have to be told later. Each way to serve is a subclass."""

    def __init__(
        self, server: HandlerTaker, services: Mapping[str, Sequence[object]], metrics: Metrics, reflect: bool
    ) -> None:
        """`services` holds, by the service's name, the objects that answer its RPCs, each some of them."""
        self._metrics = metrics
        self._streams: list[StreamRpc] = []
        self.short: dict[str, Begin] = {}
        for name, methods in ((INFERENCE_SERVICE, INFERENCE), (FEATURES_SERVICE, FEATURES)):
            handlers = {method.name: self._handler(name, method, services[name]) for method in methods.values()}
            server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, handlers),))
        self._health = add_health(server, metrics)
        if reflect:
            add_reflection(server, metrics, (INFERENCE_SERVICE, FEATURES_SERVICE))
        server.add_generic_rpc_handlers((UnknownRpcs(metrics),))

    @abstractmethod
    def bind(self, host: str, port: int) -> int:
        """Listen on `host:port` and return the port; StartError when it can't be taken."""

    @abstractmethod
    async def start(self) -> None:
        """Answer calls."""

    @abstractmethod
    async def stop(self, grace: float) -> None:
        """Refuse new calls at once, and return when the running ones have ended or `grace` seconds are over.

        Streams are read no further; they end when what was read from them is answered.
        """

    def _close(self) -> None:
        """Read no further from streams, which end when what was read from them is answered, and end every watch."""
        for stream in self._streams:
            stream.close()
        self._health.close()

    def set_health(self, services: Iterable[str], serving: bool) -> None:
        """Report services (and models as `model/NAME`) as serving or not to health checks and watchers."""
        self._health.set(services, serving)

    def shut_health(self) -> None:
        """Report everything as not serving, for good."""
        self._health.shut()

    def _handler(self, service: str, method: Method, objects: Sequence[object]) -> Handler:
        counted = Counted(service, method.name, self._metrics, method.kind)
        answer = method_of(objects, method.name)
        if answer is None:
            return UnaryRpc(method, _unimplemented(method.name), counted).handler()
        if method.kind == "unary":
            rpc = UnaryRpc(method, answer, counted, method_of(objects, f"Begin{method.name}"))
            if rpc.short:
                self.short[counted.path] = rpc.short.begin
            return rpc.handler()
        if method.kind == "server_stream":
            return ServerStreamRpc(method, answer, counted).handler()
        stream = StreamRpc(method, answer, counted)
        self._streams.append(stream)
        return stream.handler()


def _unimplemented(name: str) -> Any:
    async def answer(request: Any, call: Call) -> Message:
        raise Unimplemented(f"{name} is not implemented by this server")

    return answer
