"""The HTTP side: REST v2, metrics for Prometheus, and a page that says what is where."""

from collections.abc import Sequence

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import BaseRoute, Route

from layercast.server.repository import Repository
from layercast.server.rest.status import not_routed

_HANDLERS = {HTTPException: not_routed}


def application(repository: Repository, registry: CollectorRegistry, rest: Sequence[BaseRoute]) -> Starlette:
    """Return the application of the HTTP port; `rest` are the routes of REST v2."""

    async def index(request: Request) -> Response:
        models = "".join(f"  {v.name} {v.number}: {v.state}\n" for v in repository.versions())
        text = "layercast\n\nmodels\n" + models + "\n/v2  /v2/health/live  /v2/health/ready  /metrics\n"
        return PlainTextResponse(text)

    return Starlette(routes=[Route("/", index), *rest, metrics_route(registry)], exception_handlers=_HANDLERS)


def metrics_application(registry: CollectorRegistry) -> Starlette:
    """Return the application of the metrics port."""
    return Starlette(routes=[metrics_route(registry)], exception_handlers=_HANDLERS)


def metrics_route(registry: CollectorRegistry) -> Route:
    """Return `/metrics` in the text format or OpenMetrics, as the scraper asks."""

    async def metrics(request: Request) -> Response:
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(registry), media_type=content_type)

    return Route("/metrics", metrics)
