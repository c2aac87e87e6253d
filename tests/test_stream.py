"""ModelStreamInfer over a real connection: order, ids, errors inside a stream, half-close, callers that vanish."""

import queue
import threading

import grpc
import numpy as np
import pytest
from numeric import Model, asked, identity, numeric
from test_server_inference import values_of, wait_until

from layercast.proto.messages import ModelInferRequest, ServerLiveRequest
from layercast.proto.rpc import INFERENCE
from layercast.server.service import flight
from layercast.server.settings import ModelSettings

PATH = INFERENCE["ModelStreamInfer"].path


@pytest.fixture(scope="module")
def served():
    patient = ModelSettings(max_batch=16, max_delay_ms=50)
    with numeric({"same": Model(identity), "slow": Model(identity, settings=patient)}, max_bytes=1 << 20) as server:
        yield server


def batcher(served, name: str):
    return served.server.repository.models[name, 1].batcher


def numbered(numbers, name="same"):
    return [asked(name, np.full((1, 3), n, "f4"), id=str(n)) for n in numbers]


def gauge(served, name: str) -> float:
    return served.server.metrics.inflight.labels(name, "1").value


def test_a_thousand_requests_on_one_stream_are_answered_in_order_an_error_among_them(served):
    requests = numbered(range(1000))
    requests[500] = asked("same", np.zeros(3, "f4"), id="500")
    answers = list(served.stream(requests))
    assert [answer.infer_response.id for answer in answers] == [str(n) for n in range(1000)]
    for number, answer in enumerate(answers):
        assert answer.infer_response.parameters["triton_final_response"].bool_param
        if number == 500:
            assert "want shape [-1, -1], got [3]" in answer.error_message
            assert answer.infer_response.parameters["error_code"].string_param == "INVALID_ARGUMENT"
            assert not answer.infer_response.outputs
        else:
            assert not answer.error_message
            np.testing.assert_array_equal(values_of(answer.infer_response), np.full((1, 3), number, "f4"))
            assert answer.infer_response.model_version == "1"


def test_a_quick_request_waits_for_the_slow_one_before_it(served):
    answers = list(served.stream([*numbered([0], "slow"), *numbered([1], "same"), *numbered([2], "slow")]))
    assert [answer.infer_response.id for answer in answers] == ["0", "1", "2"]
    assert [answer.infer_response.model_name for answer in answers] == ["slow", "same", "slow"]


def test_requests_of_one_stream_run_together(served):
    statistics = served.server.repository.models["same", 1].monitor.statistics
    before = statistics.executions
    served.on_loop(batcher(served, "same").hold)
    answers = served.stream(numbered(range(12)))
    wait_until(served, lambda: batcher(served, "same").queued_rows == 12)
    served.on_loop(batcher(served, "same").release)
    assert {answer.infer_response.parameters["batch_rows"].int64_param for answer in answers} == {12}
    assert statistics.executions == before + 1


def test_no_more_than_the_bound_is_read_ahead(served, monkeypatch):
    monkeypatch.setattr(flight, "MAX_IN_FLIGHT", 5)
    served.on_loop(batcher(served, "same").hold)
    answers = served.stream(numbered(range(20)))
    wait_until(served, lambda: batcher(served, "same").queued_rows == 5)
    served.call("ServerLive", ServerLiveRequest())
    assert served.on_loop(lambda: batcher(served, "same").queued_rows) == 5
    served.on_loop(batcher(served, "same").release)
    assert [answer.infer_response.id for answer in answers] == [str(n) for n in range(20)]


def test_large_requests_are_bounded_by_bytes(served):
    """Two of 0.6 MB exceed the limit of 1 MiB together, so the second is not taken in while the first waits."""
    served.on_loop(batcher(served, "same").hold)
    answers = served.stream([asked("same", np.full((1, 150_000), n, "f4"), id=str(n)) for n in range(3)])
    wait_until(served, lambda: batcher(served, "same").queued_rows == 1)
    served.call("ServerLive", ServerLiveRequest())
    assert served.on_loop(lambda: batcher(served, "same").queued_rows) == 1
    served.on_loop(batcher(served, "same").release)
    assert [values_of(answer.infer_response)[0, 0] for answer in answers] == [0, 1, 2]


@pytest.fixture(scope="module")
def one_by_one():
    """A server whose front end hands over one message at a time."""
    with numeric({"same": Model(identity)}, front_end="grpcio") as server:
        yield server


def test_what_is_sent_far_ahead_is_started_together(one_by_one, monkeypatch):
    """Sixteen at once, then 32 together; the rest, for which no more come, when those before it are answered."""
    served = one_by_one
    monkeypatch.setattr(flight, "_GATHER_SECONDS", 60)
    served.on_loop(batcher(served, "same").hold)
    sent: queue.Queue[ModelInferRequest | None] = queue.Queue()
    answers = served.stream(iter(sent.get, None))
    for request in numbered(range(70)):
        sent.put(request)
    wait_until(served, lambda: batcher(served, "same").queued_rows == 48)
    served.call("ServerLive", ServerLiveRequest())
    assert served.on_loop(lambda: batcher(served, "same").queued_rows) == 48
    served.on_loop(batcher(served, "same").release)
    assert [next(answers).infer_response.id for _ in range(70)] == [str(n) for n in range(70)]
    sent.put(None)
    assert list(answers) == []


def test_what_is_gathered_waits_no_longer_than_a_moment(one_by_one):
    served = one_by_one
    served.on_loop(batcher(served, "same").hold)
    sent: queue.Queue[ModelInferRequest | None] = queue.Queue()
    answers = served.stream(iter(sent.get, None))
    for request in numbered(range(20)):
        sent.put(request)
    wait_until(served, lambda: batcher(served, "same").queued_rows == 20)
    answers.cancel()
    sent.put(None)
    wait_until(served, lambda: batcher(served, "same").queued_rows == 0)
    served.on_loop(batcher(served, "same").release)


def test_a_message_that_is_none_is_answered_inside_the_stream(served):
    call = served.channel.stream_stream(PATH, None, INFERENCE["ModelStreamInfer"].response.FromString)
    good = numbered([7])[0].SerializeToString()
    bad, answered = call(iter([b"\xff\xff", good]), timeout=30)
    assert "are no inference.ModelInferRequest" in bad.error_message
    assert answered.infer_response.id == "7"


def test_the_callers_header_turns_the_first_error_into_the_streams_status(served):
    requests = numbered([0, 1, 2])
    requests[1].model_name = "nothing"
    answers = served.stream(requests, metadata=(("triton_grpc_error", "true"),))
    assert next(answers).infer_response.id == "0"
    with pytest.raises(grpc.RpcError) as raised:
        next(answers)
    assert raised.value.code() is grpc.StatusCode.NOT_FOUND


def test_half_close_drains_and_a_stream_without_requests_ends_well(served):
    assert list(served.stream([])) == []
    sent: queue.Queue[ModelInferRequest | None] = queue.Queue()
    answers = served.stream(iter(sent.get, None))
    sent.put(numbered([1])[0])
    assert next(answers).infer_response.id == "1"
    served.on_loop(batcher(served, "same").hold)
    for request in numbered([2, 3, 4]):
        sent.put(request)
    sent.put(None)
    wait_until(served, lambda: batcher(served, "same").queued_rows == 3)
    served.on_loop(batcher(served, "same").release)
    assert [answer.infer_response.id for answer in answers] == ["2", "3", "4"]
    assert answers.code() is grpc.StatusCode.OK


def test_a_caller_that_vanishes_takes_its_queued_requests_along(served):
    statistics = served.server.repository.models["same", 1].monitor.statistics
    before = statistics.inferences
    served.on_loop(batcher(served, "same").hold)
    channel = grpc.insecure_channel(served.url)
    method = INFERENCE["ModelStreamInfer"]
    gate = threading.Event()

    def requests():
        yield from numbered(range(8))
        gate.wait(30)

    call = channel.stream_stream(method.path, method.request.SerializeToString)(requests())
    wait_until(served, lambda: batcher(served, "same").queued_rows == 8)
    call.cancel()
    channel.close()
    gate.set()
    wait_until(served, lambda: batcher(served, "same").queued_rows == 0)
    wait_until(served, lambda: gauge(served, "same") == 0)
    served.on_loop(batcher(served, "same").release)
    assert [a.infer_response.id for a in served.stream(numbered([5]))] == ["5"]
    assert statistics.inferences == before + 1


def test_a_deadline_of_the_stream_ends_it(served):
    served.on_loop(batcher(served, "same").hold)
    with pytest.raises(grpc.RpcError) as raised:
        list(served.stream(numbered([1]), timeout=0.3))
    assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    wait_until(served, lambda: batcher(served, "same").queued_rows == 0)
    served.on_loop(batcher(served, "same").release)


def test_idle_streams_hold_nobody_up_and_a_stop_ends_them_after_their_answers():
    with numeric({"same": Model(identity)}) as served:
        gate = threading.Event()
        served.on_loop(batcher(served, "same").hold)

        def requests():
            yield numbered([3])[0]
            gate.wait(30)

        idle = [served.stream(requests()) for _ in range(40)]
        wait_until(served, lambda: batcher(served, "same").queued_rows == 40)
        assert served.call("ServerLive", ServerLiveRequest(), timeout=5).live
        stopping = threading.Thread(target=served.wait, args=(served.server.front_end.stop(20),))
        stopping.start()
        served.on_loop(batcher(served, "same").release)
        for stream in idle:
            assert next(stream).infer_response.id == "3"
            with pytest.raises(grpc.RpcError, match="shutting down"):
                next(stream)
            assert stream.code() is grpc.StatusCode.UNAVAILABLE
        stopping.join(10)
        assert not stopping.is_alive()
        gate.set()


def test_streams_are_counted(served):
    def value(family, *more):
        return family.labels("bidi_stream", "inference.GRPCInferenceService", "ModelStreamInfer", *more).value

    metrics = served.server.metrics
    started, received, ended = (
        value(metrics.rpc_started), value(metrics.rpc_received), value(metrics.rpc_handled, "OK"),
    )  # fmt: skip
    assert len(list(served.stream(numbered(range(3))))) == 3
    wait_until(served, lambda: value(metrics.rpc_handled, "OK") == ended + 1)
    assert (value(metrics.rpc_started), value(metrics.rpc_received)) == (started + 1, received + 3)
