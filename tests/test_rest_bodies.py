"""Bodies and connections: limits before and after inflation, tiny chunks, endless heads, callers that leave."""

import gzip
import json
import socket
import time
import tracemalloc
import zlib
from concurrent.futures import ThreadPoolExecutor

import hosting
import numpy as np
import pytest
from resting import call, infer, outputs, tensor, with_binary
from serving import running
from test_server_inference import assert_answers, offline, rows_for, wait_until
from test_server_operations import get, samples, value

LIMIT = 1 << 20
ROW = np.zeros((1, 10), "f4")


@pytest.fixture(scope="module")
def small(repository):
    """A server that takes a mebibyte at most."""
    with running(repository, engine="eager", max_message_mb=1, queue_rows=8, max_batch=16) as server:
        yield server


def padded(size: int) -> bytes:
    """A right request of `size` bytes."""
    body = json.dumps({"inputs": [tensor(ROW)], "pad": ""}).encode()
    return body.replace(b'"pad": ""', b'"pad": "' + b"x" * (size - len(body)) + b'"')


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize(("size", "status"), [(LIMIT - 1, 200), (LIMIT, 200), (LIMIT + 1, 413)])
def test_the_limit_is_exact(small, modules, size, status, chunked):
    body = padded(size)
    assert len(body) == size
    got = infer(small, "shared", (body[at : at + 65_536] for at in range(0, size, 65_536)) if chunked else body)
    assert got.status == status
    if status == 413:
        assert "more than 1048576 bytes" in got.error
        assert "--max-message-mb" in got.error
    assert_answers(small, modules)


@pytest.mark.parametrize("pack", [gzip.compress, zlib.compress], ids=["gzip", "deflate"])
@pytest.mark.parametrize(("size", "status"), [(LIMIT, 200), (LIMIT + 1, 413)])
def test_the_limit_counts_inflated_bytes(small, pack, size, status):
    encoding = "gzip" if pack is gzip.compress else "deflate"
    assert infer(small, "shared", pack(padded(size)), content_encoding=encoding).status == status


def test_a_bomb_takes_no_more_memory_than_the_limit(small, modules):
    packer = zlib.compressobj(9, wbits=31)
    zeros = bytes(1 << 20)
    bomb = b"".join(packer.compress(zeros) for _ in range(512)) + packer.flush()
    assert len(bomb) < LIMIT
    tracemalloc.start()
    try:
        got = infer(small, "shared", bomb, content_encoding="gzip")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert got.status == 413
    assert peak < 8 * LIMIT
    assert_answers(small, modules)


def test_members_of_a_gzip_body_are_joined(small):
    body = json.dumps({"inputs": [tensor(ROW)]}).encode()
    got = infer(small, "shared", gzip.compress(body[:20]) + gzip.compress(body[20:]), content_encoding="gzip")
    assert outputs(got)["output"].shape == (1, 10)


@pytest.mark.parametrize(
    ("encoding", "body", "status", "text"),
    [
        ("br", b"x", 415, "content-encoding 'br' is not supported"),
        ("gzip", b"not gzip", 400, "does not inflate"),
        ("gzip", gzip.compress(b"{}", mtime=0)[:-9], 400, "cut off"),
        ("deflate", zlib.compress(b"{}") + b"x", 400, "cut off"),
    ],
)
def test_a_body_that_does_not_inflate_is_refused(small, encoding, body, status, text):
    got = infer(small, "shared", body, content_encoding=encoding)
    assert got.status == status
    assert text in got.error


def test_json_answers_have_the_limit_too(small):
    """Feature maps that fit as binary data, but not written out as text."""
    x = rows_for("resnet", 2)

    def asked(binary: bool):
        wanted = [{"name": "layer:stem", "parameters": {"binary_data": binary}}]
        document = {"inputs": [tensor(x, "image", parameters={"binary_data_size": x.nbytes})], "outputs": wanted}
        body, length = with_binary(document, x.tobytes())
        return infer(small, "resnet", body, inference_header_content_length=length)

    assert outputs(asked(True))["layer:stem"].nbytes > LIMIT // 5
    got = asked(False)
    assert got.status == 413
    assert "more than 1,048,576 bytes of JSON; ask for binary data" in got.error


def raw(server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.server.http_port), timeout=30)


def head(model: str, **headers: str) -> bytes:
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    return f"POST /v2/models/{model}/infer HTTP/1.1\r\nhost: x\r\n{lines}\r\n".encode()


def test_chunks_of_six_bytes_are_cheap(small, modules):
    body = padded(LIMIT - 4)
    chunks = b"".join(b"6\r\n" + body[at : at + 6] + b"\r\n" for at in range(0, len(body), 6))
    with raw(small) as connection:
        before = time.process_time()
        connection.sendall(head("shared", transfer_encoding="chunked", connection="close") + chunks + b"0\r\n\r\n")
        answer = b"".join(iter(lambda: connection.recv(65_536), b""))
        spent = time.process_time() - before
    assert answer.startswith(b"HTTP/1.1 200")
    # 175,000 chunks, parsed in 0.05 s in C; a parser in Python takes 0.9.
    assert spent < 0.4
    assert_answers(small, modules)


@pytest.mark.parametrize("where", ["line", "header", "headers"])
def test_an_endless_head_is_cut_off(small, modules, where):
    piece = {"line": b"x" * 4096, "header": b"x" * 4096, "headers": b"a: b\r\n" * 700}[where]
    start = {"line": b"GET /", "header": b"GET / HTTP/1.1\r\na: ", "headers": b"GET / HTTP/1.1\r\n"}[where]
    with raw(small) as connection, pytest.raises(ConnectionError):
        connection.sendall(start + piece * ((16 << 20) // len(piece)))
    assert_answers(small, modules)


def test_a_caller_that_leaves_frees_its_place_in_the_queue(small, modules):
    model = small.server.repository.find("shared", "")
    before = model.monitor.statistics.executions
    body = json.dumps({"inputs": [tensor(ROW)]}).encode()
    small.on_loop(model.batcher.hold)
    with raw(small) as connection:
        connection.sendall(head("shared", content_length=str(len(body))) + body)
        wait_until(small, lambda: model.batcher.queued_rows == 1)
    wait_until(small, lambda: model.batcher.queued_rows == 0)
    small.on_loop(model.batcher.release)
    assert model.monitor.statistics.executions == before
    assert (
        value(
            samples(get(small.metrics)), "layercast_http_requests_total", route="/v2/models/{model}/infer", status="499"
        )
        == 1
    )
    assert_answers(small, modules)


def test_a_caller_that_leaves_in_the_middle_of_its_body_is_forgotten(small, modules):
    with raw(small) as connection:
        connection.sendall(head("shared", content_length="1000") + b"{")
    assert_answers(small, modules)


def test_a_deadline_ends_the_wait_in_the_queue(small):
    model = small.server.repository.find("shared", "")
    small.on_loop(model.batcher.hold)
    got = infer(small, "shared", {"inputs": [tensor(ROW)]}, grpc_timeout="50m")
    small.on_loop(model.batcher.release)
    assert got.status == 504
    assert infer(small, "shared", {"inputs": [tensor(ROW)]}, grpc_timeout="1H").status == 200


@pytest.mark.parametrize("timeout", ["", "5", "m", "1.5S", "-1S", "123456789S", "5 S"])
def test_a_malformed_deadline_is_refused(small, timeout):
    got = infer(small, "shared", {"inputs": [tensor(ROW)]}, grpc_timeout=timeout)
    assert got.status == 400
    assert "grpc-timeout" in got.error


def test_a_full_queue_says_when_to_come_back(small):
    """The connection that fills the queue gives way to one that has nothing in it."""
    model = small.server.repository.find("shared", "")
    small.on_loop(model.batcher.hold)
    try:
        with ThreadPoolExecutor(2) as pool:
            greedy = pool.submit(infer, small, "shared", {"inputs": [tensor(np.zeros((8, 10), "f4"))]})
            wait_until(small, lambda: model.batcher.queued_rows == 8)
            other = pool.submit(infer, small, "shared", {"inputs": [tensor(ROW)]})
            assert (greedy.result().status, int(greedy.result().headers["retry-after"]) >= 1) == (503, True)
            small.on_loop(model.batcher.release)
            assert other.result().status == 200
    finally:
        small.on_loop(model.batcher.release)


def test_one_connection_carries_many_requests(small, modules):
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", small.server.http_port, timeout=30)
    for body, status in ((b"{", 400), (padded(LIMIT + 1), 413), (padded(2000), 200)):
        connection.request("POST", "/v2/models/shared/infer", body)
        response = connection.getresponse()
        assert (response.status, bool(response.read())) == (status, True)
    connection.close()
    assert call(small, "GET", "/v2/health/live").status == 200


def test_a_shutdown_answers_what_was_admitted_over_http(one_model, modules):
    with running(one_model, engine="eager") as server:
        model = server.server.repository.find("shared", "")
        server.on_loop(model.batcher.hold)
        x = rows_for("shared", 2)
        with ThreadPoolExecutor(2) as pool:
            waiting = pool.submit(infer, server, "shared", {"inputs": [tensor(x)]})
            wait_until(server, lambda: model.batcher.queued_rows == 2)
            stopping = pool.submit(server.wait, server.server.shut_down())
            np.testing.assert_allclose(outputs(waiting.result())["output"], offline(modules["shared"], x), atol=1e-5)
            stopping.result()
        if hosting.envoy:  # goes on with the tests
            assert call(server, "GET", "/v2/health/live").status == 503
        else:
            with pytest.raises(ConnectionError):
                call(server, "GET", "/v2/health/live")
