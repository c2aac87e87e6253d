"""The life of a server: start, serve, drain, stop."""

import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from pathlib import Path

import torch

from layercast.models import zoo
from layercast.proto.rpc import FEATURES_SERVICE, INFERENCE_SERVICE
from layercast.server import banner, environment
from layercast.server.errors import StartError
from layercast.server.metrics import Metrics
from layercast.server.repository import Repository
from layercast.server.rest.routes import routes
from layercast.server.service.answering import Answering
from layercast.server.service.features import FeatureService
from layercast.server.service.inference import InferenceService
from layercast.server.settings import Settings
from layercast.server.transport.grpcio import GrpcFrontEnd
from layercast.server.transport.http import HttpFrontEnd
from layercast.server.transport.security import Security
from layercast.server.web.app import application, metrics_application

logger = logging.getLogger(__name__)

_SERVICES = ("", INFERENCE_SERVICE, FEATURES_SERVICE)


class Server:
    """A whole server in one event loop. `start`, then `shut_down`; the ports are known after `start`'s first part."""

    def __init__(self, settings: Settings) -> None:
        threads = environment.cpu_budget()
        torch.set_num_threads(threads)
        self._settings = settings
        security = Security.read(settings)
        self.metrics = Metrics()
        self.metrics.build_info.info(environment.versions())
        self.repository = Repository(settings, self.metrics, threads)
        answering = Answering(self.repository, self.metrics, settings.max_message_bytes)
        services: dict[str, object] = {
            INFERENCE_SERVICE: InferenceService(self.repository, answering),
            FEATURES_SERVICE: FeatureService(self.repository, answering),
        }
        self._grpc = GrpcFrontEnd(services, self.metrics, settings.max_message_bytes, settings.reflection, security)
        rest = routes([services[INFERENCE_SERVICE]], self.metrics, settings.max_message_bytes, security)
        web = application(self.repository, self.metrics.registry, rest, security)
        tls = security.certificates.context if security.certificates else None
        self._http = HttpFrontEnd(web, "HTTP", "--http-port", tls)
        scraped = metrics_application(self.metrics.registry, rest)
        self._metrics_http = HttpFrontEnd(scraped, "metrics", "--metrics-port")
        self._health_updates: set[asyncio.Task[None]] = set()
        self._stopped = False
        self.grpc_port = self.http_port = self.metrics_port = 0

    async def start(self) -> None:
        """Take the ports, answer probes with "not ready", load the models, become ready. StartError when that fails."""
        host = self._settings.host
        self.grpc_port = self._grpc.bind(host, self._settings.grpc_port)
        self.http_port = self._http.bind(host, self._settings.http_port)
        self.metrics_port = self._metrics_http.bind(host, self._settings.metrics_port)
        await self._grpc.set_health(_SERVICES, serving=False)
        await self._grpc.start()
        await self._http.start()
        await self._metrics_http.start()
        self.repository.listen(self._model_changed)
        await self.repository.load_all(await asyncio.to_thread(self._root))
        if not any(version.model for version in self.repository.versions()):
            reasons = "; ".join(f"{v.name} {v.number}: {v.reason}" for v in self.repository.versions())
            raise StartError(f"no model could be loaded: {reasons}")
        await self._grpc.set_health(_SERVICES, serving=True)

    async def shut_down(self) -> None:
        """Say "not ready", answer what was admitted within the drain time, refuse what comes, close the ports.

        A second call does nothing.
        """
        if self._stopped:
            return
        self._stopped = True
        until = time.monotonic() + self._settings.drain_seconds
        await self._grpc.shut_health()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._settings.drain_seconds):
                await self.repository.drain()
        await self._grpc.stop(max(0.5, until - time.monotonic()))
        await self.repository.close()
        await self._http.stop()
        await self._metrics_http.stop()

    def _root(self) -> Path:
        if self._settings.repository is not None:
            return self._settings.repository
        try:
            return zoo.ensure_exported(self._settings.cache, report=_say)
        except zoo.ZooError as error:
            raise StartError(f"{error} (--cache)") from error

    def _model_changed(self, name: str, ready: bool) -> None:
        task = asyncio.create_task(self._grpc.set_health([f"model/{name}"], ready))
        self._health_updates.add(task)
        task.add_done_callback(self._health_updates.discard)


async def run(settings: Settings) -> int:
    """Serve until SIGINT or SIGTERM and return the exit code. A second signal ends the process at once."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, _signalled, stop)
    began = time.perf_counter()
    _say(banner.versions_line())
    server = Server(settings)
    starting = asyncio.create_task(server.start())
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait((starting, stopping), return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
        # A load runs in a thread that can't be stopped; nothing has been promised to anyone yet.
        _say("stopped while starting")
        sys.stdout.flush()
        os._exit(0)
    await starting
    _say(banner.table(server.repository.versions()))
    host, scheme = settings.host, "https" if settings.tls_certificate else "http"
    _say(
        f"ready in {time.perf_counter() - began:.1f} s   gRPC {host}:{server.grpc_port}   "
        f"{scheme}://{host}:{server.http_port}   metrics http://{host}:{server.metrics_port}/metrics"
    )
    _say(f"try:  layercast predict mnist --demo        stop: Ctrl-C (drains up to {settings.drain_seconds:g} s)")
    await stopping
    _say("stopping: answering what was admitted; press Ctrl-C again to stop now")
    await server.shut_down()
    _say("stopped")
    return 0


def _signalled(stop: asyncio.Event) -> None:
    if stop.is_set():
        os._exit(130)
    stop.set()


def _say(text: str) -> None:
    print(text, flush=True)
