"""More requests than a model can answer, seen from outside: who is refused, when, how it is told and counted."""

import time
from concurrent.futures import Future
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc.error_details_pb2 import RetryInfo
from holding import HeldModel, details, failure, serving_shared
from test_server_inference import request, wait_until
from test_server_operations import get, samples, value

from layercast.proto.messages import ModelStatisticsRequest


def test_a_queue_timeout_and_a_deadline_are_told_apart(repository, tmp_path):
    with serving_shared(repository, tmp_path, "queue_timeout_ms = 5000.0\nmax_batch = 1\n") as server:
        model = HeldModel(server)
        running_call = model.occupy()
        start = time.perf_counter()
        timed_out = failure(model.ask(1, timeout=200_000))
        assert 0.18 < time.perf_counter() - start < 2
        assert timed_out.code() is grpc.StatusCode.UNAVAILABLE
        assert "Request timeout expired" in timed_out.details()
        assert details(timed_out, RetryInfo).retry_delay.ToTimedelta().total_seconds() > 0
        assert failure(model.ask(2, within=0.5)).code() is grpc.StatusCode.DEADLINE_EXCEEDED
        wait_until(server, lambda: model.model.batcher.queued_rows == 0)
        assert not running_call.done()
        model.leave.set()
        running_call.result()
        assert model.batches == [1]
        assert model.metric("layercast_rejected_total", reason="queue_timeout") == 1
        assert model.metric("layercast_expired_total", when="queued") == 1


def test_deadlines_behind_a_running_batch_are_counted_as_deadlines_and_run_nothing(repository, tmp_path):
    with serving_shared(repository, tmp_path, "max_batch = 1\n") as server:
        model = HeldModel(server)
        running_call = model.occupy()
        late = [model.ask(1, within=0.5) for _ in range(5)]
        assert {failure(call).code() for call in late} == {grpc.StatusCode.DEADLINE_EXCEEDED}
        wait_until(server, lambda: model.model.batcher.queued_rows == 0)
        model.leave.set()
        running_call.result()
        assert model.batches == [1]
        assert server.call("ModelStatistics", ModelStatisticsRequest(name="shared")).model_stats[0].execution_count == 1
        assert model.metric("layercast_expired_total", when="queued") == 5
        assert model.metric("layercast_rejected_total", reason="deadline") == 5
        assert model.metric("layercast_cancelled_total", when="queued") == 0
        assert model.metric("layercast_requests_total", kind="predict", code="DEADLINE_EXCEEDED") == 5
        rpc = {"grpc_type": "unary", "grpc_service": "inference.GRPCInferenceService", "grpc_method": "ModelInfer"}
        found = samples(get(server.metrics))
        assert value(found, "grpc_server_handled_total", grpc_code="DEADLINE_EXCEEDED", **rpc) == 5
        assert value(found, "grpc_server_handled_total", grpc_code="CANCELLED", **rpc) == 0


def test_a_burst_over_the_queue_is_refused_at_once_while_a_batch_runs(repository, tmp_path):
    with serving_shared(repository, tmp_path, "max_batch = 1\nqueue_rows = 8\n") as server:
        model = HeldModel(server)
        running_call = model.occupy()
        burst = [model.ask(i) for i in range(40)]
        wait_until(server, lambda: sum(call.done() for call in burst) == 32)
        assert not running_call.done()
        refused = [call for call in burst if call.done()]
        assert {failure(call).code() for call in refused} == {grpc.StatusCode.UNAVAILABLE}
        assert all(details(failure(call), RetryInfo).retry_delay.nanos for call in refused)
        assert model.metric("layercast_queue_rows") == 8
        assert model.metric("layercast_queue_bytes") == 8 * 40
        model.leave.set()
        assert all(call.result() for call in burst if call not in refused)
        assert len(model.batches) == 9
        assert model.metric("layercast_rejected_total", reason="queue_full") == 32
        assert model.metric("layercast_queue_rows") == model.metric("layercast_queue_bytes") == 0


def test_a_greedy_connection_leaves_the_others_their_turn(repository, tmp_path):
    with serving_shared(repository, tmp_path, "max_batch = 2\n") as server:
        model = HeldModel(server)
        own = [("grpc.use_local_subchannel_pool", 1)]
        with grpc.insecure_channel(server.url, own) as greedy, grpc.insecure_channel(server.url, own) as small:
            calls: list[Future[Any]] = [model.occupy()]
            calls += [model.ask(i, channel=greedy) for i in range(100, 160)]
            model.waits(60)
            calls.append(model.ask(1, channel=small))
            model.waits(61)
            model.leave.set()
            for call in calls:
                call.result()
            assert 1 in model.first[1:3]


def test_a_full_queue_refuses_before_it_looks_at_what_was_sent(repository, tmp_path):
    with serving_shared(repository, tmp_path, "max_batch = 1\nqueue_rows = 2\n") as server:
        model = HeldModel(server)
        running_call = model.occupy()
        waiting = [model.ask(1), model.ask(2)]
        model.waits(2)
        broken = request("shared", np.zeros((1, 10), "f4"))
        broken.raw_input_contents[0] = b"too short"
        with pytest.raises(grpc.RpcError) as refused:
            server.call("ModelInfer", broken)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "2 of 2 rows wait, 1 more came" in refused.value.details()
        assert details(refused.value, RetryInfo).retry_delay.ToMilliseconds() == 100
        assert model.metric("layercast_rejected_total", reason="queue_full") == 1
        assert model.metric("layercast_requests_total", kind="predict", code="UNAVAILABLE") == 1
        model.leave.set()
        assert not any(call.exception() for call in (running_call, *waiting))
        with pytest.raises(grpc.RpcError) as wrong:
            server.call("ModelInfer", broken)
        assert wrong.value.code() is grpc.StatusCode.INVALID_ARGUMENT
