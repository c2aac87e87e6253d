"""A real server on a loopback port: predictions against offline forwards of the same weights."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
import torch
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status
from serving import Running, running

from layercast.proto.messages import (
    ModelConfigRequest,
    ModelInferRequest,
    ModelMetadataRequest,
    ModelReadyRequest,
    ModelStatisticsRequest,
    RepositoryIndexRequest,
    ServerLiveRequest,
    ServerMetadataRequest,
    ServerReadyRequest,
)

RNG = np.random.default_rng(0)
INPUTS = {"mnist": "image", "resnet": "image", "transformer": "tokens", "shared": "x"}
DATATYPES = {"transformer": "INT64"}


def rows_for(model: str, rows: int, length: int = 20) -> np.ndarray:
    if model == "transformer":
        tokens = RNG.integers(0, 256, (rows, length))
        tokens[:, length * 3 // 4 :] = 256
        return tokens
    shape = {"mnist": (1, 28, 28), "resnet": (3, 32, 32), "shared": (10,)}[model]
    return RNG.random((rows, *shape), dtype="f4")


def request(model: str, values: np.ndarray, outputs=(), **fields) -> ModelInferRequest:
    message = ModelInferRequest(model_name=model, **fields)
    message.inputs.add(name=INPUTS[model], datatype=DATATYPES.get(model, "FP32"), shape=values.shape)
    message.raw_input_contents.append(np.ascontiguousarray(values).tobytes())
    for name in outputs:
        message.outputs.add(name=name)
    return message


def values_of(response, index: int = 0) -> np.ndarray:
    output = response.outputs[index]
    dtype = {"FP32": "<f4", "FP16": "<f2", "INT64": "<i8"}[output.datatype]
    return np.frombuffer(response.raw_output_contents[index], dtype).reshape(output.shape)


def offline(module: torch.nn.Module, values: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return module(torch.from_numpy(values.copy())).numpy()


def assert_answers(served: Running, modules) -> None:
    """What must hold after every bad request: live, ready, and the next good request is right."""
    assert served.call("ServerLive", ServerLiveRequest()).live
    assert served.call("ServerReady", ServerReadyRequest()).ready
    assert served.call("ModelReady", ModelReadyRequest(name="shared")).ready
    x = rows_for("shared", 1)
    np.testing.assert_allclose(
        values_of(served.call("ModelInfer", request("shared", x))), offline(modules["shared"], x), atol=1e-5
    )


@pytest.mark.parametrize("model", sorted(INPUTS))
@pytest.mark.parametrize("rows", [1, 2, 5, 16, 37])
def test_predictions_equal_an_offline_forward_also_when_a_request_is_split(served, modules, model, rows):
    x = rows_for(model, rows)
    response = served.call("ModelInfer", request(model, x, id="q-1"))
    np.testing.assert_allclose(values_of(response), offline(modules[model], x), atol=1e-4, rtol=1e-4)
    assert (response.id, response.model_name, response.model_version) == ("q-1", model, "1")
    assert response.parameters["batch_rows"].int64_param >= min(rows, 16)
    assert response.parameters["compute_ns"].int64_param > 0


def test_typed_contents_are_answered_typed(served, modules):
    x = rows_for("shared", 3)
    message = ModelInferRequest(model_name="shared")
    tensor = message.inputs.add(name="x", datatype="FP32", shape=x.shape)
    tensor.contents.fp32_contents.extend(x.ravel().tolist())
    response = served.call("ModelInfer", message)
    assert not response.raw_output_contents
    got = np.array(response.outputs[0].contents.fp32_contents, "f4").reshape(response.outputs[0].shape)
    np.testing.assert_allclose(got, offline(modules["shared"], x), atol=1e-5)


def test_no_rows_in_no_rows_out(served, modules):
    response = served.call(
        "ModelInfer", request("mnist", np.zeros((0, 1, 28, 28), "f4"), ["logits", "layer:net.0@mean"])
    )
    assert [list(output.shape) for output in response.outputs] == [[0, 10], [0, 512]]
    assert list(response.raw_output_contents) == [b"", b""]
    assert_answers(served, modules)


def test_rows_that_wait_share_one_forward_and_each_caller_gets_its_own(served, modules):
    model = served.server.repository.find("mnist", "")
    before = model.monitor.statistics.executions
    xs = [rows_for("mnist", 2) for _ in range(8)]
    served.on_loop(model.batcher.hold)
    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(served.call, "ModelInfer", request("mnist", x)) for x in xs]
        wait_until(served, lambda: model.batcher.queued_rows == 16)
        served.on_loop(model.batcher.release)
        for x, answer in zip(xs, answers, strict=True):
            np.testing.assert_allclose(values_of(answer.result()), offline(modules["mnist"], x), atol=1e-4)
            assert answer.result().parameters["batch_rows"].int64_param == 16
    assert model.monitor.statistics.executions == before + 1


def test_texts_of_different_lengths_share_a_forward_and_equal_their_solo_answers(served, modules):
    model = served.server.repository.find("transformer", "")
    before = model.monitor.statistics.executions
    xs = [rows_for("transformer", 1, length) for length in (7, 12, 16)]
    served.on_loop(model.batcher.hold)
    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(served.call, "ModelInfer", request("transformer", x)) for x in xs]
        wait_until(served, lambda: model.batcher.queued_rows == 3)
        served.on_loop(model.batcher.release)
        for x, answer in zip(xs, answers, strict=True):
            np.testing.assert_allclose(values_of(answer.result()), offline(modules["transformer"], x), atol=1e-4)
    assert model.monitor.statistics.executions == before + 1


def wait_until(served: Running, condition) -> None:
    async def poll() -> None:
        async with asyncio.timeout(20):
            while not condition():
                await asyncio.sleep(0.001)

    served.wait(poll())


def test_sixteen_threads_get_right_answers_and_exact_counts(served, modules):
    sizes = [int(n) for n in RNG.integers(1, 9, 160)]
    xs = [rows_for("mnist", n) for n in sizes]
    before = served.call("ModelStatistics", ModelStatisticsRequest(name="mnist")).model_stats[0]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda x: served.call("ModelInfer", request("mnist", x)), xs))
    wanted = offline(modules["mnist"], np.concatenate(xs))
    np.testing.assert_allclose(np.concatenate([values_of(a) for a in answers]), wanted, atol=1e-4)
    after = served.call("ModelStatistics", ModelStatisticsRequest(name="mnist")).model_stats[0]
    assert after.inference_count - before.inference_count == sum(sizes)
    assert after.inference_stats.success.count - before.inference_stats.success.count == len(sizes)
    assert after.execution_count - before.execution_count < len(sizes)
    assert sum(b.batch_size * b.compute_infer.count for b in after.batch_stats) == after.inference_count


def test_tokens_out_of_range_and_too_long_texts_are_refused(served, modules):
    for tokens, message in ((np.full((1, 4), 257), "values from 0 to 256"), (np.zeros((1, 33), "i8"), "at most 32")):
        with pytest.raises(grpc.RpcError, match=message):
            served.call("ModelInfer", request("transformer", tokens))
    assert_answers(served, modules)


def test_floats_outside_the_trained_range_are_answered_with_a_warning(served, modules):
    x = rows_for("mnist", 2)
    assert "warning" not in served.call("ModelInfer", request("mnist", x)).parameters
    response = served.call("ModelInfer", request("mnist", x * 255))
    assert "'image': want values from 0 to 1, got" in response.parameters["warning"].string_param
    np.testing.assert_allclose(values_of(response), offline(modules["mnist"], x * 255), atol=1e-3, rtol=1e-4)
    x[0, 0, 0, 0] = np.nan
    response = served.call("ModelInfer", request("mnist", x))
    assert "got nan" in response.parameters["warning"].string_param
    np.testing.assert_allclose(values_of(response), offline(modules["mnist"], x), atol=1e-4, equal_nan=True)


def test_unknown_rpcs_and_unoffered_ones_are_unimplemented(served, modules):
    with pytest.raises(grpc.RpcError) as raised:
        served.channel.unary_unary("/inference.GRPCInferenceService/Nonsense")(b"", timeout=10)
    assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert_answers(served, modules)


def test_a_passed_deadline_is_said_and_the_rows_never_run(served, modules):
    model = served.server.repository.find("mnist", "")
    before = model.monitor.statistics.executions
    served.on_loop(model.batcher.hold)
    with pytest.raises(grpc.RpcError) as raised:
        served.call("ModelInfer", request("mnist", rows_for("mnist", 1)), timeout=0.1)
    assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    wait_until(served, lambda: model.batcher.queued_rows == 0)
    served.on_loop(model.batcher.release)
    assert model.monitor.statistics.executions == before
    assert_answers(served, modules)


def test_a_cancelled_call_leaves_the_queue(served, modules):
    model = served.server.repository.find("mnist", "")
    served.on_loop(model.batcher.hold)
    call = served.rpc("ModelInfer").future(request("mnist", rows_for("mnist", 3)), timeout=30)
    wait_until(served, lambda: model.batcher.queued_rows == 3)
    call.cancel()
    wait_until(served, lambda: model.batcher.queued_rows == 0)
    served.on_loop(model.batcher.release)
    assert_answers(served, modules)


def test_server_and_model_questions(served):
    metadata = served.call("ServerMetadata", ServerMetadataRequest())
    assert metadata.name == "layercast"
    assert "statistics" in metadata.extensions
    assert served.call("ModelReady", ModelReadyRequest(name="mnist")).ready
    assert not served.call("ModelReady", ModelReadyRequest(name="nothing")).ready
    assert not served.call("ModelReady", ModelReadyRequest(name="mnist", version="9")).ready
    with pytest.raises(grpc.RpcError, match="positive whole number"):
        served.call("ModelReady", ModelReadyRequest(name="mnist", version="x"))
    model = served.call("ModelMetadata", ModelMetadataRequest(name="mnist"))
    assert [(t.name, t.datatype, list(t.shape)) for t in model.inputs] == [("image", "FP32", [-1, 1, 28, 28])]
    assert [(t.name, t.datatype, list(t.shape)) for t in model.outputs] == [("logits", "FP32", [-1, 10])]
    assert list(model.versions) == ["1"]
    config = served.call("ModelConfig", ModelConfigRequest(name="transformer")).config
    assert (config.max_batch_size, config.input[0].name, list(config.input[0].dims)) == (16, "tokens", [-1])
    assert config.input[0].data_type == 9
    index = served.call("RepositoryIndex", RepositoryIndexRequest())
    assert [(m.name, m.version, m.state) for m in index.models] == [(name, "1", "READY") for name in sorted(INPUTS)]


def test_a_full_queue_refuses_with_a_retry_hint(one_model, modules):
    with running(one_model, queue_rows=4, max_batch=16, engine="eager") as served:
        model = served.server.repository.find("shared", "")
        served.on_loop(model.batcher.hold)
        waiting = served.rpc("ModelInfer").future(request("shared", rows_for("shared", 4)), timeout=30)
        wait_until(served, lambda: model.batcher.queued_rows == 4)
        with pytest.raises(grpc.RpcError, match="is full: 4 of 4 rows wait, 1 more came") as raised:
            served.call("ModelInfer", request("shared", rows_for("shared", 1)))
        assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
        status = Status.FromString(dict(raised.value.trailing_metadata())["grpc-status-details-bin"])
        assert any(detail.Is(RetryInfo.DESCRIPTOR) for detail in status.details)
        assert dict(raised.value.trailing_metadata())["grpc-retry-pushback-ms"] == "100"
        served.on_loop(model.batcher.release)
        assert waiting.result()
        x = rows_for("shared", 3)
        answer = served.call("ModelInfer", request("shared", x))
        np.testing.assert_allclose(values_of(answer), offline(modules["shared"], x), atol=1e-5)


def test_messages_over_the_limit_are_refused_both_ways(repository, modules):
    with running(repository, max_message_mb=1, max_batch=16, engine="eager") as served:
        with pytest.raises(grpc.RpcError) as raised:
            served.call("ModelInfer", request("mnist", rows_for("mnist", 400)))
        assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        with pytest.raises(
            grpc.RpcError, match=r"take 2,686,976 bytes for 10 rows, an answer holds 1,048,576"
        ) as raised:
            served.call("ModelInfer", request("resnet", rows_for("resnet", 10), ["layer:stem"]))
        assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert_answers(served, modules)


def test_a_call_of_the_default_size_passes(served, modules):
    x = rows_for("mnist", 4096)
    assert x.nbytes > 12_000_000
    response = served.call("ModelInfer", request("mnist", x))
    np.testing.assert_allclose(values_of(response), offline(modules["mnist"], x), atol=1e-4)


def test_draining_answers_the_admitted_and_refuses_the_rest(one_model, modules):
    with running(one_model, engine="eager") as served:
        model = served.server.repository.find("shared", "")
        served.on_loop(model.batcher.hold)
        x = rows_for("shared", 2)
        waiting = [served.rpc("ModelInfer").future(request("shared", x), timeout=30) for _ in range(6)]
        wait_until(served, lambda: model.batcher.queued_rows == 12)
        stopping = threading.Thread(target=served.wait, args=(served.server.shut_down(),))
        stopping.start()
        for call in waiting:
            np.testing.assert_allclose(values_of(call.result()), offline(modules["shared"], x), atol=1e-5)
        stopping.join()
        with pytest.raises(grpc.RpcError) as raised:
            served.call("ModelInfer", request("shared", x))
        assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
