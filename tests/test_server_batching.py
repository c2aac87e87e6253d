"""Batching seen from outside: a real server on loopback, its settings, what shares a forward, what fails alone."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from google.rpc.error_details_pb2 import BadRequest
from holding import HeldModel, details, failure, serving_shared
from serving import running
from test_server_inference import assert_answers, offline, request, rows_for, values_of
from test_server_operations import get, samples, value

from layercast.proto.messages import ModelConfigRequest
from layercast.server import environment


def test_the_configuration_shows_what_is_set(repository, tmp_path):
    settings = """
    max_batch = 8
    max_delay_ms = 5.0
    preferred_batch = [4, 8]
    priorities = 3
    queue_rows = 100
    queue_timeout_ms = 250.0
    instances = 2
    """
    with serving_shared(repository, tmp_path, settings) as server:
        config = server.call("ModelConfig", ModelConfigRequest(name="shared")).config
        batching, policy = config.dynamic_batching, config.dynamic_batching.default_queue_policy
        assert (config.max_batch_size, batching.max_queue_delay_microseconds) == (8, 5000)
        assert list(batching.preferred_batch_size) == [4, 8]
        assert (batching.priority_levels, batching.default_priority_level) == (3, 3)
        assert (policy.max_queue_size, policy.default_timeout_microseconds) == (100, 250_000)
        assert policy.allow_timeout_override
        assert config.instance_group[0].count == 2


def test_without_batching_each_request_runs_alone_and_large_ones_are_split_all_the_same(repository, modules, tmp_path):
    with serving_shared(repository, tmp_path, "batching = false\nmax_batch = 8\nmax_delay_ms = 10000.0\n") as server:
        assert not server.call("ModelConfig", ModelConfigRequest(name="shared")).config.HasField("dynamic_batching")
        model = HeldModel(server)
        model.hold()
        small = [model.ask(i) for i in range(3)]
        x = rows_for("shared", 20)
        large = server.rpc("ModelInfer").future(request("shared", x), timeout=30)
        model.waits(23)
        model.release()
        assert [call.result().parameters["batch_rows"].int64_param for call in small] == [1, 1, 1]
        np.testing.assert_allclose(values_of(large.result()), offline(modules["shared"], x), atol=1e-5)
        assert sorted(model.batches) == [1, 1, 1, 4, 8, 8]


def test_a_model_may_refuse_requests_over_its_largest_batch(repository, modules, tmp_path):
    with serving_shared(repository, tmp_path, 'oversized = "refuse"\nmax_batch = 8\n') as server:
        with pytest.raises(grpc.RpcError, match="the request has 9 rows, model 'shared' takes at most 8") as raised:
            server.call("ModelInfer", request("shared", rows_for("shared", 9)))
        assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert_answers(server, modules)
        assert HeldModel(server).metric("layercast_rejected_total", reason="too_large") == 1


def test_the_parameter_priority_orders_what_waits(repository, tmp_path):
    with serving_shared(repository, tmp_path, "priorities = 2\nmax_batch = 1\n") as server:
        model = HeldModel(server)
        calls = [model.occupy()]
        for at, priority in enumerate((2, 0, 1, 1), 1):
            calls.append(model.ask(at, priority=priority))
            model.waits(at)
        model.leave.set()
        for call in calls:
            call.result()
        assert model.first == [-1, 3, 4, 1, 2]


@pytest.mark.parametrize(
    ("name", "kind", "given"),
    [("priority", "int64_param", -1), ("timeout", "int64_param", -5), ("timeout", "string_param", "soon")],
)
def test_a_wrong_parameter_is_named(served, modules, name, kind, given):
    message = request("shared", rows_for("shared", 1))
    setattr(message.parameters[name], kind, given)
    with pytest.raises(grpc.RpcError, match=rf"parameters\[{name}\]: want ") as raised:
        served.call("ModelInfer", message)
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert details(raised.value, BadRequest).field_violations[0].field == f"parameters[{name}]"
    assert_answers(served, modules)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_model_that_gives_one_row_whatever_it_gets_fails_for_all_of_a_batch_once(repository, modules, tmp_path, rows):
    with serving_shared(repository, tmp_path) as server:
        model = HeldModel(server)
        runner = model.model.loaded.runner
        right = runner.fast.run
        runner.fast.run = lambda inputs: {name: array[:1] for name, array in right(inputs).items()}
        model.hold()
        calls = [model.ask(*range(rows)) for _ in range(3)]
        model.waits(3 * rows)
        model.release()
        for call in calls:
            assert failure(call).code() is grpc.StatusCode.INTERNAL
            assert f"'output': {3 * rows} rows went into the model" in failure(call).details()
        assert model.batches == [3 * rows]
        runner.fast.run = right
        assert_answers(server, modules)


def test_instances_share_weights_divide_the_processors_and_run_at_the_same_time(
    repository, modules, tmp_path, monkeypatch
):
    monkeypatch.setattr(environment, "cpu_budget", lambda: 2)
    torch.set_num_threads(1)  # as another model's load may leave it
    with serving_shared(repository, tmp_path, 'instances = 2\nmax_batch = 1\nengine = "onnx"\n') as server:
        served = server.server.repository.find("shared", "")
        one, two = served.loaded.runners
        assert one.fast is two.fast
        storages = [{p.data_ptr() for p in runner.eager._module.parameters()} for runner in (one, two)]
        assert storages[0] == storages[1]
        assert one.fast._session.get_session_options().intra_op_num_threads == served.loaded.threads == 1
        meeting, threads = threading.Barrier(2), []

        def together(run: Any) -> Any:
            def met(inputs: Any) -> Any:
                meeting.wait(20)
                threads.append((threading.current_thread().name, torch.get_num_threads()))
                return run(inputs)

            return met

        one.fast.run = together(one.fast.run)
        x = rows_for("shared", 2)
        np.testing.assert_allclose(
            values_of(server.call("ModelInfer", request("shared", x))), offline(modules["shared"], x), atol=1e-5
        )
        assert sorted(threads) == [(f"layercast-shared-{at}", served.loaded.threads) for at in (0, 1)]
        assert HeldModel(server).metric("layercast_model_memory_bytes", device="cpu") == 110 * 4


def test_texts_of_many_lengths_from_many_threads_equal_their_solo_answers_and_the_padding_is_counted(
    repository, modules
):
    lengths = [7, 12, 16, 19, 30, 5] * 16
    xs = [rows_for("transformer", 1 + at % 3, length) for at, length in enumerate(lengths)]
    with running(repository, max_batch=16, engine="eager") as server:
        with ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(lambda x: server.call("ModelInfer", request("transformer", x)), xs))
        for x, answer in zip(xs, answers, strict=True):
            np.testing.assert_allclose(values_of(answer), offline(modules["transformer"], x), atol=1e-4)
        found = samples(get(server.metrics))
        own = {"model": "transformer", "version": "1"}
        assert value(found, "layercast_batch_tokens_total", kind="real", **own) == sum(x.size for x in xs)
        padding = value(found, "layercast_batch_tokens_total", kind="padding", **own)
        batches = sum(
            v
            for (name, labels), v in found.items()
            if name == "layercast_batches_total" and set(own.items()) <= set(labels)
        )
        assert batches < len(xs)
        # Buckets end at 16 and 32: the shortest there, of 5 and of 19, grow by that much at most.
        assert 0 < padding <= sum(x.shape[0] * (16 - x.shape[1] if x.shape[1] <= 16 else 11) for x in xs)


def test_the_same_rows_give_the_same_bits_and_leave_no_trace_in_the_model(served):
    module = served.server.repository.find("resnet", "").loaded.runner.eager._module
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    x = rows_for("resnet", 1)
    plain = {served.call("ModelInfer", request("resnet", x)).raw_output_contents[0] for _ in range(100)}
    assert len(plain) == 1
    # Layers are read in two ways, which agree to rounding.
    tapped = [values_of(served.call("ModelInfer", request("resnet", x, ["logits", "layer:head"]))) for _ in range(20)]
    np.testing.assert_allclose(tapped, [tapped[0]] * len(tapped), atol=1e-4)
    assert before
    assert all(torch.equal(buffer, before[name]) for name, buffer in module.named_buffers())
