"""The HTTP side: REST v2, metrics for Prometheus, and a page that says what is where."""

from collections.abc import Awaitable, Callable, Sequence

from prometheus_client.exposition import choose_encoder
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from layercast.server.errors import ServingError
from layercast.server.metrics import Metrics
from layercast.server.repository import Repository
from layercast.server.rest.calls import authorization
from layercast.server.rest.status import error_response, not_routed
from layercast.server.service.scopes import METADATA
from layercast.server.transport.security import Security

Endpoint = Callable[[Request], Awaitable[Response]]

_HANDLERS = {HTTPException: not_routed}


def application(repository: Repository, metrics: Metrics, rest: Sequence[Route], security: Security) -> Starlette:
    """Return the application of the HTTP port; `rest` are the routes of REST v2."""

    async def index(request: Request) -> Response:
        models = "".join(f"  {v.name} {v.number}: {v.state}\n" for v in repository.versions())
        text = "layercast\n\nmodels\n" + models + "\n/v2  /v2/health/live  /v2/health/ready  /metrics\n"
        return PlainTextResponse(text)

    routes = [Route("/", _guarded(index, security)), *rest, Route("/metrics", _guarded(_metrics(metrics), security))]
    return Starlette(routes=routes, exception_handlers=_HANDLERS)


def metrics_application(metrics: Metrics, rest: Sequence[Route]) -> Starlette:
    """Return the application of the metrics port, never encrypted and without tokens: `/metrics` and the probes."""
    probes = [route for route in rest if route.path.startswith("/v2/health/")]
    return Starlette(routes=[Route("/metrics", _metrics(metrics)), *probes], exception_handlers=_HANDLERS)


def _guarded(endpoint: Endpoint, security: Security) -> Endpoint:
    """Return `endpoint` for callers with any token, where there are tokens."""

    async def answer(request: Request) -> Response:
        try:
            security.admit((METADATA,), authorization(request), "reading this")
        except ServingError as error:
            return error_response(error, request.url.path)
        return await endpoint(request)

    return answer


def _metrics(metrics: Metrics) -> Endpoint:
    """Return what answers in the text format or OpenMetrics, as the scraper asks."""

    async def answer(request: Request) -> Response:
        await metrics.gpus.refresh()
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(metrics.registry), media_type=content_type)

    return answer
