"""The life of a server: start, serve, drain, stop."""

import asyncio
import gc
import logging
import os
import sys
import time
from collections.abc import Awaitable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, NoReturn

import torch

from layercast.models import zoo
from layercast.proto.rpc import FEATURES_SERVICE, INFERENCE_SERVICE
from layercast.server import banner, environment
from layercast.server.errors import StartError
from layercast.server.metrics import Metrics
from layercast.server.repository import Repository
from layercast.server.rest.routes import routes
from layercast.server.service.administration import AdministrationService, SharedMemoryService
from layercast.server.service.answering import Answering
from layercast.server.service.control import ModelControl
from layercast.server.service.explaining import ExplainService
from layercast.server.service.feature_stream import FeatureStreamService
from layercast.server.service.features import FeatureService
from layercast.server.service.inference import InferenceService
from layercast.server.service.metadata import MetadataService
from layercast.server.service.steering import SteeringService
from layercast.server.service.streaming import StreamService
from layercast.server.settings import Settings
from layercast.server.transport.direct.front_end import DirectFrontEnd
from layercast.server.transport.envoy.front_end import EnvoyFrontEnd
from layercast.server.transport.front_end import FrontEnd
from layercast.server.transport.grpcio import GrpcFrontEnd
from layercast.server.transport.http import HttpFrontEnd
from layercast.server.transport.security import Security
from layercast.server.transport.signals import INTERRUPTED, SIGNALS, wait_for_signals
from layercast.server.watch import Watcher
from layercast.server.web.app import application, metrics_application

logger = logging.getLogger(__name__)

_SERVICES = ("", INFERENCE_SERVICE, FEATURES_SERVICE)
_WAITING_THREADS: Final = 4
"""Threads beside those that compute, for what waits for a disk or for another thread."""

_SWITCH_SECONDS: Final = 0.00005
"""How long the event loop may keep Python's lock from a thread that waits for it. One that begins or ends a forward
takes it for a moment; by default it waits up to 5 ms, in which the processors compute nothing."""

_CLOSING_SECONDS: Final = 0.5
"""What handlers have to send their last answers, and then models and ports to close."""


class Server:
    """A whole server in one event loop. `start`, then `shut_down`; the ports are known after `start`'s first part."""

    def __init__(self, settings: Settings) -> None:
        self._threads = threads = environment.cpu_budget()
        torch.set_num_threads(threads)
        self._settings = settings
        security = Security.read(settings)
        self.metrics = Metrics()
        self.metrics.build_info.info(environment.versions())
        self.repository = Repository(settings, self.metrics, threads)
        self.answering = answering = Answering(self.repository, self.metrics, settings.max_message_bytes)
        inference = InferenceService(answering)
        services = {
            INFERENCE_SERVICE: (
                MetadataService(self.repository),
                ModelControl(self.repository, allowed=settings.model_control == "explicit"),
                inference,
                StreamService(inference, settings.max_message_bytes),
                AdministrationService(self.repository),
                SharedMemoryService(),
            ),
            FEATURES_SERVICE: (
                FeatureService(self.repository, answering),
                FeatureStreamService(answering),
                ExplainService(answering),
                SteeringService(answering),
            ),
        }
        rest = routes(services[INFERENCE_SERVICE], self.metrics, settings.max_message_bytes, security)
        web = application(self.repository, self.metrics, rest, security)
        given = (services, self.metrics, settings.max_message_bytes, settings.reflection, security)
        self._grpc: FrontEnd
        self._http: FrontEnd | HttpFrontEnd
        if settings.front_end == "envoy":
            self._grpc = self._http = EnvoyFrontEnd(*given, web)
        else:
            tls = security.certificates.context if security.certificates else None
            self._grpc = DirectFrontEnd(*given) if settings.front_end == "direct" else GrpcFrontEnd(*given)
            self._http = HttpFrontEnd(web, "HTTP", "--http-port", tls)
        scraped = metrics_application(self.metrics, rest)
        self._metrics_http = HttpFrontEnd(scraped, "metrics", "--metrics-port")
        self._watching: asyncio.Task[None] | None = None
        self._stopped = False
        self.grpc_port = self.http_port = self.metrics_port = 0

    async def start(self) -> None:
        """Take the ports, answer probes with "not ready", load the models, become ready. StartError when that fails."""
        # Python's own counts the machine's processors, which may be many more than this process may use.
        work = ThreadPoolExecutor(self._threads + _WAITING_THREADS, thread_name_prefix="layercast-work")
        asyncio.get_running_loop().set_default_executor(work)
        host = self._settings.host
        self.grpc_port = self._grpc.bind(host, self._settings.grpc_port)
        self.http_port = self._http.bind(host, self._settings.http_port)
        self.metrics_port = self._metrics_http.bind(host, self._settings.metrics_port)
        self._grpc.set_health(_SERVICES, serving=False)
        await self._grpc.start()
        await self._http.start()
        await self._metrics_http.start()
        self.repository.listen(self._model_changed)
        root = await asyncio.to_thread(self._root)
        await self.repository.load_all(root)
        versions = self.repository.versions()
        changes = self._settings.watch > 0 or self._settings.model_control == "explicit"
        if not changes and not any(version.model for version in versions):
            reasons = "; ".join(f"{v.name} {v.number}: {v.reason}" for v in versions)
            raise StartError(f"no model could be loaded: {reasons}")
        self._grpc.set_health(_SERVICES, self.repository.ready)
        if self._settings.watch:
            self.watcher = Watcher(self.repository, root, self._settings.watch)
            self._watching = asyncio.create_task(self.watcher.run())

    async def shut_down(self) -> bool:
        """Say "not ready", answer what was admitted within the drain time, refuse what comes, close the ports.

        Returns whether everything admitted was answered. Takes the drain delay, the drain seconds and a moment for
        the ports at most, whatever the models do. A second call does nothing.
        """
        if self._stopped:
            return True
        self._stopped = True
        if self._watching:
            self._watching.cancel()
        self.repository.stop()
        self._grpc.shut_health()
        await asyncio.sleep(self._settings.drain_delay_seconds)
        clock = asyncio.get_running_loop().time
        until = clock() + self._settings.drain_seconds
        drained = await _ends(self.repository.drain(), until)
        # Handlers send their answers, and are cut off, which callers see as Unavailable, when time is up.
        left = max(until - clock(), _CLOSING_SECONDS)
        until = clock() + left
        sent = await asyncio.gather(
            _ends(self._grpc.stop(left), until + _CLOSING_SECONDS), _ends(self._http.stop(left), until)
        )
        until = clock() + _CLOSING_SECONDS
        closing = (self.repository.close(), self._metrics_http.stop(_CLOSING_SECONDS))
        await asyncio.gather(*(_ends(step, until) for step in closing))
        return drained and all(sent)

    def _root(self) -> Path:
        if self._settings.repository is not None:
            return self._settings.repository
        try:
            return zoo.ensure_exported(self._settings.cache, report=_say)
        except zoo.ZooError as error:
            raise StartError(f"{error} (--cache)") from error

    def _model_changed(self, name: str, ready: bool) -> None:
        self._grpc.set_health([f"model/{name}"], ready)
        self._grpc.set_health(_SERVICES, self.repository.ready)


async def _ends(work: Awaitable[None], until: float) -> bool:
    """Await `work` until `until` on the loop's clock; tell whether it ended. If not, it is cancelled."""
    task = asyncio.ensure_future(work)
    await asyncio.wait([task], timeout=max(0, until - asyncio.get_running_loop().time()))
    if not task.done():
        task.cancel()
        return False
    if error := task.exception():
        logger.error("a step of the shutdown failed", exc_info=error)
    return error is None


async def run(settings: Settings) -> NoReturn:
    """Serve until SIGINT or SIGTERM and end the process: 0 when all was answered, 1 when the drain time ran out.

    A second signal ends it at once, with 130. StartError when the server can't start.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    if settings.front_end == "envoy":
        wait_for_signals(lambda: loop.call_soon_threadsafe(stop.set))
    else:
        for number in SIGNALS:
            loop.add_signal_handler(number, _signalled, stop)
    began = time.perf_counter()
    _say(banner.versions_line())
    # What imports made stays: a full collection would else look through all of it, 0.2 s in which nothing is answered.
    gc.collect()
    gc.freeze()
    sys.setswitchinterval(_SWITCH_SECONDS)
    server = Server(settings)
    starting = asyncio.create_task(server.start())
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait((starting, stopping), return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
        # A load runs in a thread that can't be stopped; nothing has been promised to anyone yet.
        _say("stopped while starting")
        _end(0)
    await starting
    _say(banner.table(server.repository.versions()))
    _say(banner.front_end_line(settings.front_end))
    host, scheme = settings.host, "https" if settings.tls_certificate else "http"
    _say(
        f"ready in {time.perf_counter() - began:.1f} s   gRPC {host}:{server.grpc_port}   "
        f"{scheme}://{host}:{server.http_port}   metrics http://{host}:{server.metrics_port}/metrics"
    )
    _say(f"try:  layercast predict mnist --demo        stop: Ctrl-C (drains up to {settings.drain_seconds:g} s)")
    await stopping
    _say("stopping: answering what was admitted; press Ctrl-C again to stop now")
    if await server.shut_down():
        _say("stopped")
        _end(0)
    _say(f"stopped: some requests were not answered within {settings.drain_seconds:g} s and were cut off")
    _end(1)


def _end(code: int) -> NoReturn:
    """End the process without waiting for threads, which may be in a forward or a load that never ends."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _signalled(stop: asyncio.Event) -> None:
    if stop.is_set():
        os._exit(INTERRUPTED)
    stop.set()


def _say(text: str) -> None:
    print(text, flush=True)
