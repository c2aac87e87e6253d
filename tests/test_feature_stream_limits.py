"""What open streams of layers may hold, for how long, how their ends are counted, and what a shutdown leaves them."""

import asyncio
import gc
import threading
import weakref
from contextlib import aclosing, contextmanager

import grpc
import numpy as np
import pytest
import tiny
from serving import Running, running
from test_feature_stream import asked, ended, entry, joined
from test_server_inference import rows_for, wait_until

from layercast.proto.messages import ExtractStreamRequest, ExtractStreamResponse
from layercast.server import streams
from layercast.server.errors import Unavailable
from layercast.server.metrics import Metrics
from layercast.server.service.call import Call
from layercast.server.service.feature_stream import FeatureStreamService
from layercast.server.transport import ending
from layercast.server.transport.counted import Counted

ROWS = np.random.default_rng(2).random((40, 10), dtype="f4")  # five parts


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory):
    root = tmp_path_factory.mktemp("streams")
    tiny.write(root, 1, seed=1)
    return root


@contextmanager
def held(root, **settings):
    """A server that runs nothing until its model's batcher is released, and the model."""
    with running(root, **{"engine": "eager", "max_batch": 8, **settings}) as server:
        model = server.server.repository.find("tiny", "")
        server.on_loop(model.batcher.hold)
        try:
            yield server, model
        finally:
            server.on_loop(model.batcher.release)


def message(rows: np.ndarray = ROWS) -> ExtractStreamRequest:
    request = ExtractStreamRequest()
    request.extract.model_name = "tiny"
    request.extract.layers.append("shared#1")
    request.extract.outputs.append("output")
    request.extract.inputs.add(name="x", datatype="FP32", shape=rows.shape, data=rows.tobytes())
    return request


def stream(server: Running, rows: np.ndarray = ROWS, timeout: float = 30.0):
    return server.rpc("ExtractStream")(message(rows), timeout=timeout)


def assert_whole(messages) -> None:
    np.testing.assert_allclose(joined(messages)["output"], tiny.expected(1, ROWS), atol=1e-5)


def ends(server: Running) -> dict[tuple[str, ...], float]:
    """How requests ended without an answer, beside their statuses."""
    metrics = server.server.metrics
    found = {
        (name, *labels[2:]): series.value
        for name, family in (
            ("rejected", metrics.rejected), ("expired", metrics.expired), ("cancelled", metrics.cancelled)
        )
        for labels, series in family._series.items()
    }  # fmt: skip
    return {key: value for key, value in found.items() if value}


def failed(server: Running, code: str) -> float:
    return server.server.metrics.requests.labels("tiny", "1", "features", code).value


def test_streams_that_hold_too_much_together_are_refused(root):
    rows = np.ones((400, 10), "f4")  # 16,000 bytes, as they came and decoded, and 80 a row of two parts of 8
    with held(root, queue_bytes=70_000) as (server, model):
        open_streams = [stream(server, rows) for _ in range(2)]
        wait_until(server, lambda: model.batcher.queued_rows == 32)
        holding = model.streams.bytes
        assert 2 * (2 * rows.nbytes + 16 * 80) <= holding < 70_000
        with pytest.raises(grpc.RpcError, match=r"hold 6\d,\d+ of 70,000 bytes, 32,\d+ more came") as raised:
            list(stream(server, rows, timeout=5))
        assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
        assert dict(raised.value.trailing_metadata())["grpc-retry-pushback-ms"] == "100"
        assert ends(server) == {("rejected", "queue_full"): 1}
        assert model.streams.bytes == holding
        server.on_loop(model.batcher.release)
        for each in open_streams:
            assert sum(answer.rows for answer in each) == 400
        wait_until(server, lambda: model.streams.bytes == 0)
        # One alone may hold more.
        assert sum(answer.rows for answer in stream(server, np.ones((2000, 10), "f4"))) == 2000


def test_a_caller_who_takes_nothing_for_long_is_cut_off(served, slow_reader, monkeypatch):
    """Also from what the transport keeps of the call, which ends before the caller reads on."""
    monkeypatch.setattr(streams, "TAKEN_SECONDS", 0.2)
    monkeypatch.setattr(ending, "_STATUS_SECONDS", 0.05)
    model, before = entry(served, "resnet"), ended(served, "resnet", "UNAVAILABLE")
    tasks = served.on_loop(lambda: len(asyncio.all_tasks()))
    messages = slow_reader(asked("resnet", rows_for("resnet", 12), ["*"]))
    next(messages)
    wait_until(served, lambda: ended(served, "resnet", "UNAVAILABLE") == before + 1)
    wait_until(served, lambda: len(asyncio.all_tasks()) <= tasks + 1)  # one is this wait
    assert (model.streams.bytes, model.monitor.inflight.value, model.batcher.queued_rows) == (0, 0, 0)
    with pytest.raises(grpc.RpcError, match=r"no message of the stream was taken for 0\.2 s") as raised:
        list(messages)
    assert raised.value.code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("leaves", ["reload", "stop"])
def test_a_stream_that_nobody_reads_does_not_keep_the_model_or_the_server(root, tmp_path, monkeypatch, leaves):
    monkeypatch.setattr(streams, "HURRIED_SECONDS", 0.05)
    tiny.write(tmp_path, 1, seed=1)
    with running(tmp_path, engine="eager", max_batch=8, model_control="explicit", drain_seconds=30.0) as server:
        taken: list[ExtractStreamResponse] = []
        old = server.server.repository.find("tiny", "")

        async def idle() -> None:
            async with aclosing(
                FeatureStreamService(server.server.answering).extract_stream(message(), Call())
            ) as answers:
                async for answer in answers:
                    taken.append(answer)
                    await asyncio.Event().wait()

        reading = asyncio.run_coroutine_threadsafe(idle(), server.loop)
        wait_until(server, lambda: taken)
        if leaves == "reload":
            tiny.write(tmp_path, 1, seed=2)
            tiny.load(server)
            server.wait(old.released())
        else:
            assert server.wait(server.server.shut_down())
        with pytest.raises(Unavailable, match=r"no message of the stream was taken for 0\.05 s"):
            reading.result(10)
        assert failed(server, "UNAVAILABLE") == 1
        assert ends(server) == {}
        assert (old.streams.bytes, old.monitor.inflight.value, old.batcher.queued_rows) == (0, 0, 0)


async def test_a_call_that_fails_keeps_nothing_until_a_garbage_collection():
    """grpc keeps the error that ends a call in a circle with the call."""

    class Large:
        pass

    class Context:
        async def abort(self, *_):
            self.error = grpc.aio.AbortError()
            raise self.error

    async def body(large: Large) -> None:
        raise Unavailable("full")

    large = Large()
    held, running = weakref.ref(large), body(large)
    del large
    gc.disable()
    try:
        with pytest.raises(grpc.aio.AbortError):
            await ending.run_counted(Counted("s", "n", Metrics()), running, Context())
        del running
        assert held() is None
    finally:
        gc.enable()


def test_a_reader_who_comes_back_too_late_is_told(root, monkeypatch):
    """As one drives the generator who does not close it."""
    monkeypatch.setattr(streams, "TAKEN_SECONDS", 0.01)
    with running(root, engine="eager", max_batch=8) as server:
        answers = FeatureStreamService(server.server.answering).extract_stream(message(), Call())
        server.wait(anext(answers))
        server.wait(asyncio.sleep(0.05))
        with pytest.raises(Unavailable, match="read as it comes"):
            server.wait(anext(answers))


def test_a_shutdown_answers_the_streams_that_it_admitted_and_no_new_ones(root):
    with held(root) as (server, model):
        admitted = stream(server)
        wait_until(server, lambda: model.batcher.queued_rows == 16)
        draining = asyncio.run_coroutine_threadsafe(server.server.repository.drain(), server.loop)
        wait_until(server, lambda: model.batcher.draining)
        with pytest.raises(grpc.RpcError, match="shutting down") as raised:
            list(stream(server))
        assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
        assert ends(server) == {("rejected", "draining"): 1}
        assert_whole(admitted)
        draining.result(10)


def test_a_whole_shutdown_ends_with_the_last_part(root):
    with held(root) as (server, model):
        admitted = stream(server)
        wait_until(server, lambda: model.batcher.queued_rows == 16)
        stopped = []
        stopping = threading.Thread(target=lambda: stopped.append(server.wait(server.server.shut_down())))
        stopping.start()
        assert_whole(admitted)
        stopping.join()
        assert stopped == [True]


def test_a_late_stream_counts_once(root):
    with held(root) as (server, _):
        with pytest.raises(grpc.RpcError) as raised:
            list(stream(server, timeout=1.0))
        assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        wait_until(server, lambda: failed(server, "DEADLINE_EXCEEDED") == 1)
        assert ends(server) == {("rejected", "deadline"): 1, ("expired", "queued"): 1}


def test_a_cancelled_stream_counts_once(root):
    with held(root) as (server, model):
        call = stream(server)
        wait_until(server, lambda: model.batcher.queued_rows == 16)
        call.cancel()
        wait_until(server, lambda: failed(server, "CANCELLED") == 1)
        assert ends(server) == {("cancelled", "queued"): 1}


def test_a_stream_that_waited_too_long_counts_once(root):
    with held(root, queue_timeout_ms=20) as (server, _):
        with pytest.raises(grpc.RpcError, match="Request timeout expired"):
            list(stream(server))
        assert ends(server) == {("rejected", "queue_timeout"): 1}


def test_a_stream_that_finds_the_queue_full_counts_once(root):
    with held(root, queue_rows=8) as (server, model):
        first = stream(server, ROWS[:8])
        wait_until(server, lambda: model.batcher.queued_rows == 8)
        with pytest.raises(grpc.RpcError, match="is full"):
            list(stream(server))
        assert ends(server) == {("rejected", "queue_full"): 1}
        server.on_loop(model.batcher.release)
        assert sum(answer.rows for answer in first) == 8


def test_a_part_that_waits_behind_one_that_failed_is_not_counted_as_cancelled(root, monkeypatch):
    with held(root) as (server, model):

        def fail(*_, **named):
            model.batcher.hold()  # the next part still waits when the error arrives
            raise RuntimeError("this text is for the log only")

        monkeypatch.setattr(model.loaded.runner.eager._module, "forward", fail)
        call = stream(server)
        wait_until(server, lambda: model.batcher.queued_rows == 16)
        server.on_loop(model.batcher.release)
        with pytest.raises(grpc.RpcError, match="internal error"):
            list(call)
        assert ends(server) == {}
