"""Bearer tokens and their scopes, on every RPC and every route of a real server."""

import logging
import os
import subprocess
import sys

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from resting import call, tensor
from serving import running
from test_server_inference import offline, request, rows_for
from test_server_operations import get, samples, value

from layercast.client import AsyncClient, Client
from layercast.client.errors import PermissionDenied, Unauthenticated
from layercast.proto.rpc import FEATURES, INFERENCE
from layercast.server.errors import StartError
from layercast.server.service.scopes import SCOPES
from layercast.server.transport.security import OPEN, RPC_SCOPES
from layercast.server.transport.tokens import read_tokens

TOKENS = {scope: f"token-{scope}-0123456789abcdef" for scope in SCOPES}
METHODS = {**INFERENCE, **FEATURES}
DENIED = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)


def entry(name: str = "a", token: str = "0123456789abcdef", scopes: str = '["predict"]') -> str:
    return f'[[tokens]]\nname = "{name}"\ntoken = "{token}"\nscopes = {scopes}\n'


@pytest.fixture(scope="module")
def guarded(one_model, tmp_path_factory):
    """A server with a token for each scope, and one for predictions and features."""
    path = tmp_path_factory.mktemp("tokens") / "tokens.toml"
    entries = [entry(scope, token, f'["{scope}"]') for scope, token in TOKENS.items()]
    path.write_text("\n".join(entries) + entry("both", "token-both-0123456789abcdef", '["predict", "features"]'))
    path.chmod(0o600)
    with running(one_model, engine="eager", token_file=path, model_control="explicit") as server:
        yield server


def status(server, name: str, authorization: str | None) -> grpc.StatusCode:
    """The status of an RPC called with an empty message and this header; UNKNOWN for what nobody at all may do."""
    method = METHODS[name]
    metadata = [("authorization", authorization)] if authorization is not None else []
    try:
        if method.kind == "server_stream":
            list(server.channel.unary_stream(method.path)(b"", metadata=metadata, timeout=20))
        elif method.kind == "bidi_stream":
            list(server.channel.stream_stream(method.path)(iter([b""]), metadata=metadata, timeout=20))
        else:
            server.channel.unary_unary(method.path)(b"", metadata=metadata, timeout=20)
    except grpc.RpcError as error:
        return grpc.StatusCode.UNKNOWN if "shared memory is off" in error.details() else error.code()
    return grpc.StatusCode.OK


def test_every_rpc_has_a_scope():
    assert set(RPC_SCOPES) == set(METHODS)
    assert all(set(scopes) <= {OPEN, *SCOPES} for scopes in RPC_SCOPES.values())


@pytest.mark.parametrize("name", sorted(METHODS))
def test_an_rpc_opens_to_its_scope_and_to_no_other(guarded, name):
    scopes = RPC_SCOPES[name]
    expected = grpc.StatusCode.OK if scopes == (OPEN,) else grpc.StatusCode.UNAUTHENTICATED
    if scopes == (OPEN,):
        assert status(guarded, name, None) not in DENIED
        return
    assert status(guarded, name, None) is expected
    for scope, token in TOKENS.items():
        may = scope in scopes or scopes == ("metadata",)
        got = status(guarded, name, f"Bearer {token}")
        assert (got not in DENIED) if may else got is grpc.StatusCode.PERMISSION_DENIED, (scope, got)


@pytest.mark.parametrize(
    "authorization",
    [
        "", "Bearer", "Bearer ", TOKENS["predict"], f"Basic {TOKENS['predict']}", f"Bearer {TOKENS['predict'][:-1]}",
        f"Bearer {TOKENS['predict']}x", f"Bearer {TOKENS['predict'].upper()}", f"Bearer {TOKENS['predict']} x",
        f"Bearer {TOKENS['predict']},{TOKENS['admin']}",
    ],
)  # fmt: skip
def test_what_is_not_exactly_a_token_is_nobody(guarded, authorization):
    assert status(guarded, "ModelInfer", authorization) is grpc.StatusCode.UNAUTHENTICATED
    got = call(guarded, "POST", "/v2/models/shared/infer", {}, {"Authorization": authorization})
    assert (got.status, got.headers["www-authenticate"]) == (401, "Bearer")
    assert got.error


def test_a_token_of_other_characters_is_nobody(guarded):
    got = call(guarded, "GET", "/v2", None, {"Authorization": "Bearer t\xf6ken-predict"})
    assert got.status == 401


def test_two_headers_are_nobody(guarded):
    stub = guarded.channel.unary_unary(METHODS["ServerMetadata"].path)
    both = [("authorization", f"Bearer {TOKENS[scope]}") for scope in ("predict", "admin")]
    with pytest.raises(grpc.RpcError) as raised:
        stub(b"", metadata=both, timeout=20)
    assert raised.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_the_scheme_may_be_written_in_any_case(guarded):
    assert status(guarded, "ServerMetadata", f"bearer {TOKENS['predict']}") is grpc.StatusCode.OK


@pytest.mark.parametrize(
    ("token", "outputs", "denied"),
    [
        ("predict", [], ""), ("predict", ["output"], ""), ("predict", ["layer:relu"], "asking for layers"),
        ("predict", ["output", "layer:relu"], "asking for layers"), ("features", ["layer:relu"], ""),
        ("features", [], "asking for outputs"), ("features", ["output", "layer:relu"], "asking for outputs"),
    ],
)  # fmt: skip
def test_outputs_and_layers_of_one_rpc_have_scopes_of_their_own(guarded, token, outputs, denied):
    metadata = [("authorization", f"Bearer {TOKENS[token]}")]
    asked = request("shared", rows_for("shared", 1), outputs)
    document = {"inputs": [tensor(rows_for("shared", 1))], "outputs": [{"name": name} for name in outputs]}
    got = call(guarded, "POST", "/v2/models/shared/infer", document, dict(metadata))
    if not denied:
        assert guarded.rpc("ModelInfer")(asked, metadata=metadata, timeout=20).outputs
        assert got.status == 200
        return
    with pytest.raises(grpc.RpcError, match=denied) as raised:
        guarded.rpc("ModelInfer")(asked, metadata=metadata, timeout=20)
    assert raised.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert got.status == 403
    assert denied in got.error


def test_probes_stay_open_and_reflection_does_not(guarded):
    stub = health_pb2_grpc.HealthStub(guarded.channel)
    assert stub.Check(health_pb2.HealthCheckRequest(), timeout=20).status == health_pb2.HealthCheckResponse.SERVING
    for path in ("/v2/health/live", "/v2/health/ready", "/v2/models/shared/ready"):
        assert call(guarded, "GET", path).status == 200
    reflect = reflection_pb2_grpc.ServerReflectionStub(guarded.channel).ServerReflectionInfo
    ask = reflection_pb2.ServerReflectionRequest(list_services="")
    with pytest.raises(grpc.RpcError, match="UNAUTHENTICATED"):
        list(reflect(iter([ask]), timeout=20))
    metadata = [("authorization", f"Bearer {TOKENS['metadata']}")]
    assert list(reflect(iter([ask]), metadata=metadata, timeout=20))


ROUTES = {
    "GET /": "metadata", "GET /metrics": "metadata", "GET /v2": "metadata", "GET /v2/models/stats": "metadata",
    "GET /v2/models/shared": "metadata", "GET /v2/models/shared/config": "metadata",
    "GET /v2/models/shared/versions/1/stats": "metadata", "POST /v2/repository/index": "metadata",
    "POST /v2/models/shared/infer": "predict", "POST /v2/models/shared/versions/1/infer": "predict",
    "POST /v2/repository/models/nobody/load": "admin", "POST /v2/repository/models/nobody/unload": "admin",
    "GET /v2/logging": "admin", "POST /v2/logging": "admin", "POST /v2/models/shared/trace/setting": "admin",
    "GET /v2/systemsharedmemory/status": "metadata", "POST /v2/cudasharedmemory/unregister": "admin",
}  # fmt: skip


@pytest.mark.parametrize("route", ROUTES)
def test_a_route_opens_to_its_scope(guarded, route):
    method, path = route.split()
    body = {"inputs": [tensor(np.zeros((1, 10), "f4"))]} if path.endswith("infer") else None
    assert call(guarded, method, path, body).status == 401
    assert call(guarded, method, path, body, {"Authorization": f"Bearer {TOKENS[ROUTES[route]]}"}).status not in (
        401,
        403,
    )
    if ROUTES[route] != "metadata":
        assert call(guarded, method, path, body, {"Authorization": f"Bearer {TOKENS['metadata']}"}).status == 403


def test_an_unknown_caller_is_refused_before_its_body_is_read(guarded):
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", guarded.server.http_port, timeout=20)
    connection.putrequest("POST", "/v2/models/shared/infer")
    connection.putheader("content-length", "1000000")
    connection.endheaders()
    assert connection.getresponse().status == 401
    connection.close()


def test_no_token_is_written_anywhere(guarded, caplog):
    caplog.set_level(logging.DEBUG)
    wrong = "wrong-0123456789abcdef"
    for token in (wrong, TOKENS["predict"]):
        status(guarded, "RepositoryModelLoad", f"Bearer {token}")
        got = call(guarded, "POST", "/v2/repository/models/nobody/load", {}, {"Authorization": f"Bearer {token}"})
        assert token not in got.body.decode()
    seen = caplog.text + get(guarded.metrics) + repr(vars(guarded.server))
    client = Client(guarded.url, token=TOKENS["predict"])
    seen += repr(client.__dict__)
    client.close()
    for token in (wrong, *TOKENS.values()):
        assert token not in seen


def test_refusals_are_counted(guarded):
    rpc = {"grpc_type": "unary", "grpc_service": "inference.GRPCInferenceService", "grpc_method": "LogSettings"}

    def count(code: str) -> float:
        return samples(get(guarded.metrics)).get(
            ("grpc_server_handled_total", tuple(sorted({**rpc, "grpc_code": code}.items()))), 0
        )

    before = count("UNAUTHENTICATED"), count("PERMISSION_DENIED")
    status(guarded, "LogSettings", None)
    status(guarded, "LogSettings", f"Bearer {TOKENS['predict']}")
    assert (count("UNAUTHENTICATED"), count("PERMISSION_DENIED")) == (before[0] + 1, before[1] + 1)
    call(guarded, "GET", "/v2/logging")
    assert value(samples(get(guarded.metrics)), "layercast_http_requests_total", route="/v2/logging", status="401") >= 1


async def test_both_clients_send_a_token(guarded, modules, monkeypatch):
    x = rows_for("shared", 2)
    expected = offline(modules["shared"], x)
    with Client(guarded.url, token="token-both-0123456789abcdef") as client:
        np.testing.assert_allclose(client.predict("shared", x), expected, atol=1e-5)
        assert list(client.features("shared", x, "relu"))
    with Client(guarded.url, token=TOKENS["features"]) as client, pytest.raises(PermissionDenied, match="predict"):
        client.predict("shared", x)
    with Client(guarded.url) as client, pytest.raises(Unauthenticated, match="wants a token"):
        client.predict("shared", x)
    monkeypatch.setenv("LAYERCAST_TOKEN", TOKENS["predict"])
    async with AsyncClient(guarded.url) as client:
        np.testing.assert_allclose(await client.predict("shared", x), expected, atol=1e-5)
    with pytest.raises(ValueError, match="no token has"):
        Client(guarded.url, token="two words")


def test_the_command_line_takes_a_token_file(guarded, tmp_path):
    (tmp_path / "token").write_text(TOKENS["metadata"] + "\n")
    command = [sys.executable, "-m", "layercast.server", "models", "--url", guarded.url]
    environ = {**os.environ, "NO_COLOR": "1"}
    done = subprocess.run(
        [*command, "--token-file", str(tmp_path / "token")], capture_output=True, text=True, env=environ, timeout=60
    )
    assert (done.returncode, "shared" in done.stdout) == (0, True), done.stderr
    done = subprocess.run(command, capture_output=True, text=True, env=environ, timeout=60)
    assert (done.returncode, "wants a token" in done.stderr) == (1, True)


SECRET = "s3cret-0123456789abcdef"
FILES = {
    "": "no tokens in",
    "tokens = []": "no tokens in",
    'other = 1\n[[tokens]]\nname = "a"': "no tokens in",
    f"[[tokens]\n{SECRET}": "is not TOML",
    "[[tokens]]\nname = 'a'": "token 1: want tables",
    entry(name=""): "token 1: name must be",
    entry(token=""): r"token 1 \('a'\): a token has at least 16",
    entry(token="short"): "a token has at least 16 characters",
    entry(token=SECRET + " x"): "no blanks",
    entry(token=SECRET + "é"): "printable ASCII",
    entry(token=SECRET, scopes="[]"): "scopes must be a list of metadata, predict, features, admin",
    entry(token=SECRET, scopes='["root"]'): "scopes must be a list",
    entry(token=SECRET, scopes='"predict"'): "scopes must be a list",
    entry(token=SECRET) + entry(name="b", token=SECRET): "have the same token",
    entry(token=SECRET) + "expires = 1": "token 1: want tables",
}  # fmt: skip


@pytest.mark.parametrize("content", FILES)
def test_a_wrong_token_file_stops_the_start_without_showing_a_token(tmp_path, content):
    (tmp_path / "tokens.toml").write_text(content)
    with pytest.raises(StartError, match=FILES[content]) as raised:
        read_tokens(tmp_path / "tokens.toml")
    assert str(raised.value).startswith("token_file: ")
    assert SECRET not in str(raised.value)


def test_a_missing_token_file_stops_the_start(one_model, tmp_path):
    with pytest.raises(StartError, match="token_file: can't read .*none.toml.*No such file"), running(one_model, token_file=tmp_path / "none.toml"):  # fmt: skip
        pass
