"""The paths of REST v2, and what each asks of the service."""

import dataclasses
import functools
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from google.protobuf.message import Message
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from layercast.proto import messages as m
from layercast.server.errors import InvalidArgument
from layercast.server.metrics import Metrics
from layercast.server.rest.answers import accepted_encoding, write_answer
from layercast.server.rest.body import read_body
from layercast.server.rest.calls import Context, call_of, unless_gone
from layercast.server.rest.documents import SMALL, dumped, parse
from layercast.server.rest.messages import as_json, fill_repository_parameters
from layercast.server.rest.requests import JSON_LENGTH, bare_request, json_length, read_request
from layercast.server.service.call import Call
from layercast.server.transport.security import Security

Ask = Callable[[Request], Message]

_MODEL = "/v2/models/{model}"
_VERSION = _MODEL + "/versions/{version}"
_SMALL_BODY = 1 << 20  # of requests that carry no tensors


def routes(services: Sequence[object], metrics: Metrics, max_bytes: int, security: Security) -> list[Route]:
    """Return the routes; `services` answer the RPCs of the protocol, `max_bytes` bounds bodies either way."""
    context = Context(services, metrics, max_bytes, security)
    get = functools.partial(_get, context)
    made = [
        get("/v2", "ServerMetadata", lambda _: m.ServerMetadataRequest()),
        get("/v2/health/live", "ServerLive", lambda _: m.ServerLiveRequest(), flag="live"),
        get("/v2/health/ready", "ServerReady", lambda _: m.ServerReadyRequest(), flag="ready"),
        get("/v2/models/stats", "ModelStatistics", lambda _: m.ModelStatisticsRequest()),
    ]
    for base in (_MODEL, _VERSION):
        made += [
            get(base, "ModelMetadata", lambda r: m.ModelMetadataRequest(**_named(r))),
            get(f"{base}/ready", "ModelReady", lambda r: m.ModelReadyRequest(**_named(r)), flag="ready"),
            get(f"{base}/config", "ModelConfig", lambda r: m.ModelConfigRequest(**_named(r)), part="config"),
            get(f"{base}/stats", "ModelStatistics", lambda r: m.ModelStatisticsRequest(**_named(r))),
            context.route(f"{base}/infer", "ModelInfer", functools.partial(_infer, context), "POST"),
        ]
    return made + _administration(context)


def _administration(context: Context) -> list[Route]:
    def post(path: str, rpc: str, endpoint: Callable[[Context, Request], Awaitable[Response]]) -> Route:
        return context.route(path, rpc, functools.partial(endpoint, context), "POST")

    made = [
        post("/v2/repository/index", "RepositoryIndex", _index),
        post("/v2/repository/models/{model}/load", "RepositoryModelLoad", _load),
        post("/v2/repository/models/{model}/unload", "RepositoryModelUnload", _unload),
        post("/v2/logging", "LogSettings", _set_logging),
        _get(context, "/v2/logging", "LogSettings", lambda _: m.LogSettingsRequest(), shape=_settings),
    ]
    for path in ("/v2/trace/setting", _MODEL + "/trace/setting"):
        made += [
            post(path, "TraceSetting", _set_trace),
            _get(context, path, "TraceSetting", _trace_request, shape=_settings),
        ]
    for kind, name in (("system", "SystemSharedMemory"), ("cuda", "CudaSharedMemory")):
        base = f"/v2/{kind}sharedmemory"
        for verb, method in (("status", "GET"), ("register", "POST"), ("unregister", "POST")):
            rpc = f"{name}{verb.capitalize()}"
            ask = functools.partial(_region, getattr(m, f"{rpc}Request"))
            answer = functools.partial(_plain, context, rpc, ask)
            made += [context.route(f"{base}{part}/{verb}", rpc, answer, method) for part in ("", "/region/{region}")]
    return made


def _get(
    context: Context,
    path: str,
    rpc: str,
    ask: Ask,
    *,
    flag: str = "",
    part: str = "",
    shape: Callable[[Message], dict[str, Any]] = as_json,
) -> Route:
    """Return a GET route for an RPC. A `flag` that is false is answered with 503, as probes want it."""

    async def answer(request: Request) -> Response:
        message = await context.call(rpc, ask(request), call_of(request))
        found = shape(getattr(message, part) if part else message)
        if flag and "model" in request.path_params:
            found["name"] = request.path_params["model"]
        return _json(found, 200 if not flag or found[flag] else 503)

    return context.route(path, rpc, answer, "GET")


async def _plain(context: Context, rpc: str, ask: Ask, request: Request) -> Response:
    return _json(as_json(await context.call(rpc, ask(request), call_of(request))))


async def _infer(context: Context, request: Request) -> Response:
    call, headers = call_of(request), request.headers
    names = request.path_params["model"], request.path_params.get("version", "")
    body = await read_body(request, context.max_bytes)
    call = dataclasses.replace(call, size=len(body))
    length = json_length(headers.get(JSON_LENGTH), len(body))
    if length:
        read = functools.partial(read_request, *names, body, length)
        message, forms = await context.work(read, length > SMALL)
    else:
        metadata = await context.call("ModelMetadata", m.ModelMetadataRequest(**_named(request)), Call())
        message, forms = bare_request(*names, body, metadata)
    del body
    response = await unless_gone(request, context.call("ModelInfer", message, call))
    write = functools.partial(
        write_answer, response, forms, context.max_bytes, accepted_encoding(headers.get("accept-encoding", ""))
    )
    written = await context.work(write, response.ByteSize() > SMALL)
    return Response(written.content, headers=written.headers)


async def _index(context: Context, request: Request) -> Response:
    given = await _document(request)
    asked = m.RepositoryIndexRequest(ready=_typed(given, "ready", bool, default=False))
    answer = await context.call("RepositoryIndex", asked, call_of(request))
    return _json([as_json(entry) for entry in answer.models])


async def _load(context: Context, request: Request) -> Response:
    asked = m.RepositoryModelLoadRequest(model_name=request.path_params["model"])
    fill_repository_parameters(asked.parameters, (await _document(request)).get("parameters"))
    return _json(as_json(await context.call("RepositoryModelLoad", asked, call_of(request))))


async def _unload(context: Context, request: Request) -> Response:
    asked = m.RepositoryModelUnloadRequest(model_name=request.path_params["model"])
    fill_repository_parameters(asked.parameters, (await _document(request)).get("parameters"))
    return _json(as_json(await context.call("RepositoryModelUnload", asked, call_of(request))))


def _trace_request(request: Request) -> m.TraceSettingRequest:
    return m.TraceSettingRequest(model_name=request.path_params.get("model", ""))


async def _set_trace(context: Context, request: Request) -> Response:
    asked = _trace_request(request)
    for key, value in (await _document(request)).items():
        # null, which clears a setting, is a setting without values.
        values = [] if value is None else value if isinstance(value, list) else [value]
        asked.settings[key].value.extend(str(item) for item in values)
    return _json(_settings(await context.call("TraceSetting", asked, call_of(request))))


async def _set_logging(context: Context, request: Request) -> Response:
    asked = m.LogSettingsRequest()
    for key, value in (await _document(request)).items():
        if isinstance(value, bool):
            asked.settings[key].bool_param = value
        elif isinstance(value, int) and 0 <= value < 1 << 32:
            asked.settings[key].uint32_param = value
        elif isinstance(value, str):
            asked.settings[key].string_param = value
        else:
            raise InvalidArgument(f"setting {key[:64]!r}: want true or false, a whole number or a string")
    return _json(_settings(await context.call("LogSettings", asked, call_of(request))))


def _settings(answer: Message) -> dict[str, Any]:
    """Return settings as Triton shows them: the bare values by name, a list only where there are several."""
    found: dict[str, Any] = {}
    for key, value in as_json(answer)["settings"].items():
        values = value["value"] if "value" in value else list(value.values())
        found[key] = values[0] if len(values) == 1 and key != "trace_level" else values
    return found


def _region(kind: type[Message], request: Request) -> Message:
    return kind(name=request.path_params.get("region", ""))


def _named(request: Request) -> dict[str, str]:
    return {"name": request.path_params["model"], "version": request.path_params.get("version", "")}


async def _document(request: Request) -> dict[str, Any]:
    """Return the JSON object in the body, an empty one for an empty body."""
    given = parse(await read_body(request, _SMALL_BODY) or b"{}")
    if not isinstance(given, dict):
        raise InvalidArgument("the body must be a JSON object")
    return given


def _typed(given: dict[str, Any], key: str, kind: type, *, default: Any) -> Any:
    value = given.get(key, default)
    if not isinstance(value, kind):
        raise InvalidArgument(f"{key} must be {kind.__name__}", field=key)
    return value


def _json(value: Any, status: int = 200) -> Response:
    return Response(dumped(value), status, media_type="application/json")
