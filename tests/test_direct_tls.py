"""The front end `direct` under TLS, and with clients of other makers: curl, and whoever takes it for something else."""

import shutil
import socket
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from direct import LIVE, OK, assert_alive, assert_echoed, floats, peers_of, serving_directly
from h2_frames import PREFACE, call_headers, message, settings_frame
from serving import Running
from test_security_tls import Files

from layercast.proto.rpc import INFERENCE
from layercast.server.transport.security import Security
from layercast.server.transport.tls import read_certificates

LIVE_PATH = INFERENCE["ServerLive"].path


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Files:
    return Files(tmp_path_factory.mktemp("certificates"))


def guarded(files: Files, client_ca: str | None = None) -> Security:
    ca = Path(files[client_ca]) if client_ca else None
    return Security(read_certificates(Path(files["ca-server.crt"]), Path(files["ca-server.key"]), ca), None)


def reach(server: Running, files: Files, client: bool) -> None:
    """The channel of `server`, which others use, speaks TLS from now on."""
    names = ("ca.pem", "ca-client.key", "ca-client.crt") if client else ("ca.pem",)
    pems = [Path(files[name]).read_bytes() for name in names]
    server.channel.close()
    server.channel = grpc.secure_channel(
        server.url.replace("127.0.0.1", "localhost"), grpc.ssl_channel_credentials(*pems)
    )


@pytest.fixture(scope="module")
def encrypted(files) -> Iterator[Running]:
    with serving_directly(security=guarded(files)) as server:
        reach(server, files, client=False)
        yield server


@pytest.fixture(scope="module")
def mutual(files) -> Iterator[Running]:
    with serving_directly(security=guarded(files, "ca.pem")) as server:
        reach(server, files, client=True)
        yield server


@pytest.fixture
def connect_tls(encrypted) -> Iterator:
    with peers_of(encrypted) as connect:
        yield connect


@pytest.fixture
def connect_mutual(mutual) -> Iterator:
    with peers_of(mutual) as connect:
        yield connect


def trusting(files: Files, *protocols: str, certificate: str = "") -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=files["ca.pem"])
    if protocols:
        context.set_alpn_protocols(list(protocols))
    if certificate:
        context.load_cert_chain(files[f"{certificate}.crt"], files[f"{certificate}.key"])
    return context


def test_calls_come_through_tls(connect_tls, files):
    peer = connect_tls(tls=trusting(files, "h2"))
    assert peer.socket.selected_alpn_protocol() == "h2"
    assert_alive(peer, 1)
    peer.open_window(0, 1 << 24)
    peer.headers(3, call_headers("ModelInfer", scheme="https"))
    peer.open_window(3, 1 << 24)
    peer.upload(3, message(floats(500_000).SerializeToString()))
    assert_echoed(peer.answer(3), 500_000)


def test_of_several_protocols_h2_is_taken(connect_tls, files):
    peer = connect_tls(tls=trusting(files, "http/1.1", "h2"))
    assert peer.socket.selected_alpn_protocol() == "h2"
    assert_alive(peer, 1)


@pytest.mark.parametrize("protocols", [(), ("http/1.1",)])
def test_a_client_that_knows_no_h2_is_answered_or_left(connect_tls, files, protocols):
    """Who speaks HTTP/2 without saying so before may do so."""
    try:
        peer = connect_tls(tls=trusting(files, *protocols), greet=False)
    except (ssl.SSLError, ConnectionError):
        return
    peer.send(PREFACE + settings_frame({}))
    peer.frame(6, payload=bytes(8))
    while (found := peer.read()) is not None and found.kind != 6:
        pass


def test_http1_over_tls_gets_a_short_answer_or_none(connect_tls, files):
    try:
        peer = connect_tls(tls=trusting(files), greet=False)
    except (ssl.SSLError, ConnectionError):
        return
    peer.send(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
    assert len(everything(peer.socket)) < 1000


def test_mutual_tls_lets_in_who_has_a_certificate_of_its_authority(connect_mutual, files):
    assert_alive(connect_mutual(tls=trusting(files, "h2", certificate="ca-client")), 1)


@pytest.mark.parametrize("certificate", ["", "stranger-client"])
def test_mutual_tls_lets_in_nobody_else(connect_mutual, files, certificate):
    with pytest.raises((ssl.SSLError, ConnectionError, AssertionError)):  # as soon as the client learns of it
        assert_alive(connect_mutual(tls=trusting(files, "h2", certificate=certificate)), 1)


def everything(sock: socket.socket) -> bytes:
    content = b""
    try:
        while piece := sock.recv(65_536):
            content += piece
    except (ConnectionError, ssl.SSLError):
        pass
    return content


@pytest.mark.parametrize("data", [PREFACE + settings_frame({}), b"GET / HTTP/1.1\r\n\r\n", bytes(100)])
def test_plain_text_on_a_port_of_tls_is_left(connect_tls, data):
    peer = connect_tls(greet=False)
    peer.send(data)
    assert len(everything(peer.socket)) < 100


def test_tls_on_a_plain_port_is_left(connect, direct, files):
    with pytest.raises((ssl.SSLError, ConnectionError)):
        connect(tls=trusting(files, "h2"))


def test_a_handshake_that_stops_holds_up_nobody(connect_tls, files):
    for half in (b"", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"):
        peer = connect_tls(greet=False)
        peer.send(half)
    assert_alive(connect_tls(tls=trusting(files, "h2")), 1)


CURL = shutil.which("curl")
NO_CURL = "needs curl with HTTP/2"


def curl(*arguments: str, body: bytes = message(b"")) -> "subprocess.CompletedProcess[bytes]":
    """Send a call with curl; what comes back has the headers and trailers before the body."""
    if CURL is None or b"HTTP2" not in subprocess.run([CURL, "-V"], capture_output=True).stdout:
        pytest.skip(NO_CURL)
    command = [CURL, "-sS", "-i", "-m", "20", "-H", "content-type: application/grpc", "-H", "te: trailers"]
    return subprocess.run([*command, "--data-binary", "@-", *arguments], input=body, capture_output=True, timeout=30)


def test_curl_calls(direct):
    done = curl("--http2-prior-knowledge", f"http://{direct.url}{LIVE_PATH}")
    assert done.returncode == OK, done.stderr
    assert done.stdout.startswith(b"HTTP/2 200")
    assert message(LIVE) in done.stdout
    assert b"grpc-status: 0" in done.stdout


def test_curl_calls_through_tls(encrypted, files):
    url = f"https://localhost:{encrypted.server.grpc_port}{LIVE_PATH}"
    done = curl("--http2", "--cacert", files["ca.pem"], url)
    assert done.returncode == OK, done.stderr
    assert done.stdout.startswith(b"HTTP/2 200")
    assert message(LIVE) in done.stdout


def test_curl_with_what_is_no_call(direct):
    # Without a body: some versions of curl fail where an answer comes before all of theirs is sent.
    done = curl("--http2-prior-knowledge", "-H", "content-type: text/plain", f"http://{direct.url}/v2", body=b"")
    assert done.stdout.startswith(b"HTTP/2 415")
    done = curl("--http1.1", f"http://{direct.url}{LIVE_PATH}")
    assert done.stdout.startswith(b"HTTP/1.1 400"), done.stdout
    assert b"--http-port" in done.stdout
