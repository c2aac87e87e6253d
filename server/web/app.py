"""The HTTP side: health for probes, metrics for Prometheus, and a page that says what is where."""

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from layercast.server.environment import installed_version
from layercast.server.repository import Repository


def application(repository: Repository, registry: CollectorRegistry) -> Starlette:
    """Return the application of the HTTP port."""

    async def index(request: Request) -> Response:
        models = "".join(f"  {v.name} {v.number}: {v.state}\n" for v in repository.versions())
        text = "layercast\n\nmodels\n" + models + "\n/v2  /v2/health/live  /v2/health/ready  /metrics\n"
        return PlainTextResponse(text)

    async def server(request: Request) -> Response:
        return JSONResponse({"name": "layercast", "version": installed_version("layercast") or "", "extensions": []})

    async def live(request: Request) -> Response:
        return JSONResponse({"live": True})

    async def ready(request: Request) -> Response:
        return JSONResponse({"ready": repository.ready}, status_code=200 if repository.ready else 503)

    routes = [
        Route("/", index),
        Route("/v2", server),
        Route("/v2/health/live", live),
        Route("/v2/health/ready", ready),
        metrics_route(registry),
    ]
    return Starlette(routes=routes)


def metrics_application(registry: CollectorRegistry) -> Starlette:
    """Return the application of the metrics port."""
    return Starlette(routes=[metrics_route(registry)])


def metrics_route(registry: CollectorRegistry) -> Route:
    """Return `/metrics` in the text format or OpenMetrics, as the scraper asks."""

    async def metrics(request: Request) -> Response:
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(registry), media_type=content_type)

    return Route("/metrics", metrics)
