"""A real server on loopback ports for tests, in this process."""

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import grpc
import hosting
from one_run import cache

from layercast.proto.rpc import FEATURES, INFERENCE
from layercast.server.lifecycle import Server
from layercast.server.settings import read

T = TypeVar("T")


class Running:
    """A server that answers. `call` speaks to it as any client would; `server` is for its gates and counts."""

    def __init__(self, server: Server, loop: asyncio.AbstractEventLoop) -> None:
        self.server = server
        self.url = f"127.0.0.1:{server.grpc_port}"
        self.http = f"http://127.0.0.1:{server.http_port}"
        self.metrics = f"http://127.0.0.1:{server.metrics_port}/metrics"
        self.loop = loop
        limit = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
        self.channel = grpc.insecure_channel(self.url, options=limit)

    def rpc(self, name: str) -> Callable[..., Any]:
        """Return the stub of the RPC `name`, of either service."""
        method = {**INFERENCE, **FEATURES}[name]
        make = self.channel.unary_stream if method.kind == "server_stream" else self.channel.unary_unary
        return make(method.path, method.request.SerializeToString, method.response.FromString)

    def call(self, name: str, request: Any, timeout: float = 30.0) -> Any:
        """Call the RPC `name` and return its answer."""
        return self.rpc(name)(request, timeout=timeout)

    def stream(self, requests: Iterable[Any], timeout: float = 30.0, metadata: Any = ()) -> Any:
        """Open ModelStreamInfer with `requests`; an iterator of its answers, and the call."""
        method = INFERENCE["ModelStreamInfer"]
        stub = self.channel.stream_stream(method.path, method.request.SerializeToString, method.response.FromString)
        return stub(iter(requests), timeout=timeout, metadata=metadata)

    def on_loop(self, function: Callable[[], T]) -> T:
        """Run `function` on the server's event loop, where its state may be touched, and return what it returns."""

        async def run() -> T:
            return function()

        return self.wait(run())

    def wait(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the server's event loop and return what it returns."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(60)


@contextmanager
def running(repository: Path, **settings: Any) -> Iterator[Running]:
    """Start a server on `repository` with `settings` on free ports, yield it ready, and shut it down."""

    async def start(ports: dict[str, object]) -> Server:
        given = {
            "repository": repository,
            "metrics_port": 0,
            "drain_seconds": 5.0,
            "cache": cache(),
            "instances": 1,  # what is measured on a busy machine changes from run to run, and with it how rows meet
            **ports,
            **settings,
        }
        server = Server(read(given))
        try:
            await server.start()
        except BaseException:
            await server.shut_down()
            raise
        return server

    name = settings.get("front_end")
    with hosting.event_loop(name) as loop, hosting.front_end(name) as ports:

        def on_loop(coroutine: Coroutine[Any, Any, T]) -> T:
            return asyncio.run_coroutine_threadsafe(coroutine, loop).result(120)

        server = on_loop(start(ports))
        running_server = Running(server, loop)
        try:
            yield running_server
        finally:
            running_server.channel.close()
            on_loop(server.shut_down())
