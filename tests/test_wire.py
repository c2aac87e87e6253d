"""Bytes that no client of ours would send: malformed, nested, compressed, oversized, misnamed."""

import logging
import re
import resource
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import hosting
import numpy as np
import pytest
from grpc_health.v1 import health
from grpc_reflection.v1alpha import reflection
from numeric import Model, asked, identity, numeric
from test_server_inference import values_of, wait_until

from layercast.proto.messages import ModelInferRequest, ModelReadyRequest, ServerLiveRequest, ServerReadyRequest
from layercast.proto.rpc import FEATURES, INFERENCE
from layercast.server.errors import InvalidArgument
from layercast.server.service.inference import InferenceService
from layercast.server.transport.status import reply

LIMIT = 4 << 20
UNARY = {
    method.path: method.request.DESCRIPTOR.full_name
    for method in (*INFERENCE.values(), *FEATURES.values())
    if method.kind == "unary"
} | {f"/{health.SERVICE_NAME}/Check": "grpc.health.v1.HealthCheckRequest"}
MALFORMED = {
    "truncated": b"\x0a\x7fabc",
    "no tag": b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff",
    "text": b"GET / HTTP/1.1\r\n\r\n",
    "group never closed": b"\x9b\x3e" * 10_000,
    "deep groups": b"\x9b\x3e" * 10_000 + b"\x9c\x3e" * 10_000,
}


@pytest.fixture(scope="module")
def served():
    first = Model(lambda inputs: {"y": inputs["x"][:, :1]}, outputs=[("y", "FP32", (1,))])
    with numeric({"same": Model(identity), "first": first}, max_bytes=LIMIT) as server:
        yield server


@pytest.fixture(autouse=True)
def still_answers(served):
    """After every test: live, ready, and a right answer."""
    yield
    assert served.call("ServerLive", ServerLiveRequest()).live
    assert served.call("ServerReady", ServerReadyRequest()).ready
    assert served.call("ModelReady", ModelReadyRequest(name="same")).ready
    x = np.array([[1.5, -2]], "f4")
    np.testing.assert_array_equal(values_of(served.call("ModelInfer", asked("same", x))), x)


def handled(served, path: str, code: str, kind: str = "unary") -> float:
    service, name = path.strip("/").split("/")
    return served.server.metrics.rpc_handled.labels(kind, service, name, code).value


@pytest.mark.parametrize("path", UNARY)
def test_malformed_bytes_are_the_callers_fault_on_every_rpc_and_counted(served, path):
    before = handled(served, path, "INVALID_ARGUMENT")
    for number, wire in enumerate(MALFORMED.values()):
        with pytest.raises(grpc.RpcError, match=f"are no {UNARY[path]}") as raised:
            served.channel.unary_unary(path)(wire, timeout=10)
        assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT, number
    assert handled(served, path, "INVALID_ARGUMENT") == before + len(MALFORMED)


def test_malformed_bytes_to_a_watch_and_to_reflection_too(served):
    watch = served.channel.unary_stream(f"/{health.SERVICE_NAME}/Watch")
    reflect = served.channel.stream_stream(f"/{reflection.SERVICE_NAME}/ServerReflectionInfo")
    for call in (watch(b"\xff", timeout=10), reflect(iter([b"\xff"]), timeout=10)):
        with pytest.raises(grpc.RpcError, match="1 bytes are no grpc") as raised:
            next(call)
        assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_unknown_fields_are_ignored(served):
    x = np.array([[3.0]], "f4")
    # Field 1000 as a number, and as bytes; then the same inside the input.
    extra = b"\xc0\x3e\x07" + b"\xc2\x3e\x02hi"
    message = asked("same", x)
    message.inputs[0].MergeFromString(extra)
    raw = message.SerializeToString() + extra
    response = served.channel.unary_unary(INFERENCE["ModelInfer"].path)(raw, timeout=10)
    np.testing.assert_array_equal(values_of(INFERENCE["ModelInfer"].response.FromString(response)), x)
    typed = ModelInferRequest(model_name="same")
    tensor = typed.inputs.add(name="x", datatype="FP32", shape=[1, 2])
    tensor.contents.fp32_contents.extend([1, 2])
    tensor.contents.MergeFromString(extra)
    assert list(served.call("ModelInfer", typed).outputs[0].contents.fp32_contents) == [1, 2]


def test_fields_may_come_in_any_order(served):
    x = np.arange(12, dtype="f4").reshape(3, 4)
    message, first = asked("same", x), ModelInferRequest()
    first.raw_input_contents.append(x.tobytes())
    for field in ("raw_input_contents", "inputs"):
        rest = ModelInferRequest.FromString(message.SerializeToString())
        rest.ClearField("raw_input_contents")
        if field == "inputs":
            first.inputs.extend(rest.inputs)
            rest.ClearField("inputs")
        raw = b"".join(part.SerializeToString() for part in (first, rest))
        for _ in range(2):  # the second time it may be known what such a request looks like
            response = served.channel.unary_unary(INFERENCE["ModelInfer"].path)(raw, timeout=10)
            np.testing.assert_array_equal(values_of(INFERENCE["ModelInfer"].response.FromString(response)), x)


def test_text_that_is_not_utf8_is_malformed(served):
    with pytest.raises(grpc.RpcError, match="UTF-8") as raised:
        served.channel.unary_unary(INFERENCE["ModelReady"].path)(b"\x0a\x02\xff\xfe", timeout=10)
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("compression", [grpc.Compression.NoCompression, grpc.Compression.Gzip])
def test_the_limit_is_exact(served, compression):
    message = asked("first", np.zeros((1, LIMIT // 4 - 100), "f4"))
    message.id = "x" * (LIMIT - message.ByteSize() - 4)
    call = served.channel.unary_unary(INFERENCE["ModelInfer"].path)
    message.id = "x" * (len(message.id) + LIMIT - message.ByteSize())
    assert message.ByteSize() == LIMIT
    assert call(message.SerializeToString(), timeout=30, compression=compression)
    message.id += "x"
    with pytest.raises(grpc.RpcError) as raised:
        call(message.SerializeToString(), timeout=30, compression=compression)
    assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


SENDER = """
import sys, grpc
path, url, size, head = sys.argv[1], sys.argv[2], int(sys.argv[3]), bytes.fromhex(sys.argv[4])
channel = grpc.insecure_channel(url, options=[("grpc.max_send_message_length", -1)])
try:
    channel.unary_unary(path)(head + bytes(size), timeout=60, compression=grpc.Compression.Gzip)
    print("OK")
except grpc.RpcError as error:
    print(error.code().name)
"""


class PeakMemory:
    """The most memory that this process held while the block ran, beyond what it held before, in bytes."""

    def __enter__(self) -> "PeakMemory":
        self.bytes, self._before, self._over = 0, self._resident(), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.001):
            self.bytes = max(self.bytes, self._resident() - self._before)

    @staticmethod
    def _resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_the_limit_counts_inflated_bytes_and_no_more_than_a_few_limits_are_held(served):
    def send(size: int) -> str:
        head = asked("same", np.zeros((1, 0), "f4"))
        head.inputs[0].shape[:] = [1, size // 4]
        del head.raw_input_contents[:]
        varint = bytes([*(size >> 7 * place & 0x7F | 0x80 for place in range(3)), size >> 21])
        # Field 7, a length, and then the zeros that the sender appends.
        start = head.SerializeToString() + b"\x3a" + varint
        command = [sys.executable, "-c", SENDER, INFERENCE["ModelInfer"].path, served.url, str(size), start.hex()]
        return subprocess.run(command, capture_output=True, text=True, timeout=90, check=True).stdout.strip()

    assert send(3 << 20) == "OK"
    with PeakMemory() as peak:
        assert send(6 << 20) == "RESOURCE_EXHAUSTED"
        assert send(64 << 20) == "RESOURCE_EXHAUSTED"
    assert peak.bytes < 8 * LIMIT, peak.bytes


@pytest.mark.parametrize("size", [63 << 10, 200 << 10])
def test_oversized_headers_are_refused(served, size):
    method = INFERENCE["ServerLive"]
    with grpc.insecure_channel(served.url) as channel, pytest.raises(grpc.RpcError) as raised:
        channel.unary_unary(method.path)(b"", timeout=10, metadata=(("x-large", "a" * size),))
    # Envoy resets the call.
    refusal = grpc.StatusCode.INTERNAL if hosting.envoy else grpc.StatusCode.RESOURCE_EXHAUSTED
    assert raised.value.code() in (refusal, grpc.StatusCode.UNAVAILABLE)


def test_headers_that_hold_a_long_token_pass(served):
    """12 KiB, which gRPC's own default refuses now and then."""
    method = INFERENCE["ServerLive"]
    with grpc.insecure_channel(served.url) as channel:
        for _ in range(20):
            channel.unary_unary(method.path)(b"", timeout=10, metadata=(("authorization", "a" * (12 << 10)),))


def test_rpcs_that_nobody_offers_are_unimplemented_and_counted_under_one_name(served):
    # HTTP does not allow the last, and Envoy doesn't pass it on.
    paths = ["/inference.GRPCInferenceService/Nonsense", "/nobody/At/All", "/x\x1b[31m/y"]
    for path in paths[: 2 if hosting.envoy else 3]:
        with pytest.raises(grpc.RpcError, match="this server has no RPC") as raised:
            served.channel.unary_unary(path)(b"", timeout=10)
        assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED
        assert raised.value.details().isprintable()
    with pytest.raises(grpc.RpcError) as raised:
        next(served.channel.stream_stream("/inference.GRPCInferenceService/Nothing")(iter([]), timeout=10))
    assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED
    names = {
        sample.labels["grpc_method"]
        for family in served.server.metrics.registry.collect()
        for sample in family.samples
        if "grpc_method" in sample.labels
    }
    assert "(unknown)" in names
    assert not {"Nonsense", "Nothing", "At", "At/All", "y"} & names


def test_forged_names_stay_on_their_line_and_short(served, caplog):
    caplog.set_level(logging.DEBUG)
    for name in ("\nI0205 18:34:18 1 file.cc:1] forged", "\x1b[31mred", "\u2028\u202e", "n" * 1_000_000, "日" * 1000):
        message = asked("same", np.zeros((1, 1), "f4"))
        message.inputs[0].name = name
        with pytest.raises(grpc.RpcError, match="has no input") as raised:
            served.call("ModelInfer", message)
        assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert raised.value.details().isprintable()
        assert len(raised.value.details()) < 300
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_no_error_text_outgrows_a_header():
    for text in ("x" * 1_000_000, "日" * 5000, "\n" * 5000, "a\x00b"):
        answer = reply(InvalidArgument(text, field=text), "/x/y")
        assert len(answer.message.encode()) <= 1024
        assert answer.message.isprintable()
        assert sum(len(value) for _, value in answer.trailers) < 4096


def test_one_connection_has_only_so_many_calls_at_a_time_and_another_is_answered(served):
    model = served.server.repository.models["same", 1]
    served.on_loop(model.batcher.hold)
    with grpc.insecure_channel(served.url, options=[("grpc.use_local_subchannel_pool", 1)]) as greedy:
        method = INFERENCE["ModelInfer"]
        infer = greedy.unary_unary(method.path, method.request.SerializeToString, method.response.FromString)
        calls = [infer.future(asked("same", np.zeros((1, 1), "f4")), timeout=60) for _ in range(512)]
        wait_until(served, lambda: model.batcher.queued_rows == 512)
        served.on_loop(model.batcher.release)
        assert all(call.result().outputs for call in calls)
        served.on_loop(model.batcher.hold)
        calls = [infer.future(asked("same", np.zeros((1, 1), "f4")), timeout=60) for _ in range(1100)]
        wait_until(served, lambda: model.batcher.queued_rows >= 1000)
        assert served.call("ServerLive", ServerLiveRequest(), timeout=10).live
        with pytest.raises(grpc.RpcError, match="Deadline Exceeded"):  # no place is left on this connection
            greedy.unary_unary(INFERENCE["ServerLive"].path)(b"", timeout=0.5)
        assert served.on_loop(lambda: model.batcher.queued_rows) <= 1024
        for call in calls:
            call.cancel()
    wait_until(served, lambda: model.batcher.queued_rows == 0)
    served.on_loop(model.batcher.release)


def test_calls_cancelled_at_any_moment_leave_nothing_behind(served):
    """Sixteen threads cancel unary calls, questions and streams after 0 to 3 ms."""
    unary = [served.rpc("ModelInfer"), served.rpc("ModelReady")]
    messages = [asked("same", np.zeros((1, 8), "f4")), ModelReadyRequest(name="same")]

    def cancel(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(40):
            which = int(rng.integers(0, 3))
            call = served.stream(messages[:1] * 3) if which == 2 else unary[which].future(messages[which], timeout=30)
            threading.Event().wait(rng.random() * 0.003)
            call.cancel()

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(cancel, range(16)))
    model = served.server.repository.models["same", 1]
    wait_until(served, lambda: model.batcher.queued_rows == 0)
    wait_until(served, lambda: served.server.metrics.inflight.labels("same", "1").value == 0)


def test_a_caller_is_its_connection_whatever_its_headers_say(monkeypatch):
    """Connections take turns in the queue: one that could pass as many would not."""
    peers = []
    answer = InferenceService.model_infer

    async def noted(self, request, call):
        peers.append(call.peer)
        return await answer(self, request, call)

    monkeypatch.setattr(InferenceService, "model_infer", noted)
    with numeric({"same": Model(identity)}) as server:
        for address in ("198.51.100.1", "198.51.100.2"):
            metadata = (("x-forwarded-for", address), ("x-real-ip", address))
            server.rpc("ModelInfer")(asked("same", np.ones((1, 2), "f4")), timeout=10, metadata=metadata)
    assert re.fullmatch(r"ipv4:127\.0\.0\.1:\d+", peers[0])
    assert peers[0] == peers[1]
