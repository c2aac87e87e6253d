"""ModelStreamInfer: requests that come together share a work, and each ends as if it had come alone."""

import random
from collections import Counter

import grpc
import numpy as np
import pytest
from h2_peer import Peer, call_headers, message
from numeric import Model, asked, numeric
from test_server_inference import values_of, wait_until

from layercast.proto.messages import ModelInferRequest, ModelInferResponse, ModelStreamInferResponse
from layercast.proto.rpc import INFERENCE
from layercast.server.settings import ModelSettings

BAD = 13.0
# Fixed sizes: others are answered on the general path.
FIXED = {"inputs": [("x", "FP32", (3,))], "outputs": [("y", "FP32", (3,))]}
TIMES = ("queue_ns", "compute_ns", "batch_rows")


def twice(arrays):
    if (arrays["x"] == BAD).any():
        raise ValueError("thirteen")
    return {"y": arrays["x"] * 2}


@pytest.fixture(scope="module", params=["direct", "grpcio"])
def served(request):
    models = {
        "plain": Model(twice, **FIXED),
        "small": Model(twice, **FIXED, settings=ModelSettings(max_batch=16, max_delay_ms=0, queue_rows=4)),
        "ranged": Model(twice, **FIXED, range=(0, 100)),
        "dynamic": Model(twice),
    }
    with numeric(models, max_bytes=1 << 20, front_end=request.param) as server:
        yield server


def batcher(served, name="plain"):
    return served.server.repository.models[name, 1].batcher


def rows(numbers, name="plain", many=1) -> list[ModelInferRequest]:
    return [asked(name, np.full((many, 3), n, "f4"), id=f"{n:g}") for n in numbers]


def held(served, requests, queued: int, name="plain", **options):
    """Send `requests` while nothing runs; return their answers' iterator once `queued` rows wait."""
    served.on_loop(batcher(served, name).hold)
    answers = served.stream(requests, **options)
    wait_until(served, lambda: batcher(served, name).queued_rows == queued)
    return answers


def counts(served, name="plain") -> Counter[str]:
    """What is counted by request, of one model."""
    metrics, found = served.server.metrics, Counter()
    for status in ("OK", "INTERNAL", "UNAVAILABLE", "CANCELLED", "DEADLINE_EXCEEDED", "INVALID_ARGUMENT"):
        found[status] = metrics.requests.labels(name, "1", "predict", status).value
    for reason in ("queue_full", "deadline"):
        found[reason] = metrics.rejected.labels(name, "1", reason).value
    found["gone"] = metrics.cancelled.labels(name, "1", "queued").value
    found["late"] = metrics.expired.labels(name, "1", "queued").value
    samples = metrics.request_duration.labels(name, "1", "predict").samples()
    found["durations"] = next(value for suffix, _, value in samples if suffix == "_count")
    samples = metrics.queue_duration.labels(name, "1").samples()
    found["waits"] = next(value for suffix, _, value in samples if suffix == "_count")
    statistics = served.server.repository.models[name, 1].monitor.statistics
    found["success"], found["fail"] = statistics.success.count, statistics.fail.count
    found["inferences"] = statistics.inferences
    return found


def gained(served, before: Counter[str], name="plain") -> dict[str, float]:
    """What was counted since, when nothing is in flight any more."""
    wait_until(served, lambda: served.server.metrics.inflight.labels(name, "1").value == 0)
    now = counts(served, name)
    return {key: now[key] - before[key] for key in now if now[key] != before[key]}


def typed(number: float) -> ModelInferRequest:
    message = asked("plain", np.full((1, 3), number, "f4"), id=f"{number:g}")
    message.inputs[0].contents.fp32_contents.extend([number] * 3)
    message.raw_input_contents.clear()
    return message


def hurried(number: float) -> ModelInferRequest:
    (message,) = rows([number])
    message.parameters["priority"].int64_param = 1
    return message


KINDS = {
    "plain": lambda n: rows([n])[0],
    "several rows": lambda n: rows([n], many=3)[0],
    "other model": lambda n: rows([n], "ranged")[0],
    "outside": lambda n: rows([n + 200], "ranged")[0],
    "dynamic": lambda n: rows([n], "dynamic")[0],
    "large": lambda n: asked("dynamic", np.full((1, 70_000), n, "f4"), id=f"{n:g}"),
    "more than a batch": lambda n: rows([n], many=20)[0],
    "typed": typed,
    "parameters": hurried,
    "outputs": lambda n: asked("plain", np.full((1, 3), n, "f4"), outputs=["y"], id=f"{n:g}"),
    "no id": lambda n: asked("plain", np.full((1, 3), n, "f4")),
    "long id": lambda n: asked("plain", np.full((1, 3), n, "f4"), id="ü" * 90),
    "unknown model": lambda n: rows([n], "nothing")[0],
    "wrong shape": lambda n: asked("plain", np.full(3, n, "f4"), id=f"{n:g}"),
    "breaks the model": lambda n: rows([BAD])[0],
}


def settled(response: ModelInferResponse) -> ModelInferResponse:
    """A copy without what is of one forward only."""
    copy = ModelInferResponse.FromString(response.SerializeToString())
    for name in (*TIMES, "triton_final_response"):
        copy.parameters.pop(name, None)
    return copy


def alone(served, request: ModelInferRequest) -> tuple[str, str, ModelInferResponse]:
    """The status, text and answer that a request has as a single call."""
    try:
        return "", "", settled(served.call("ModelInfer", request))
    except grpc.RpcError as error:
        return error.code().name, error.details(), ModelInferResponse(id=request.id)


@pytest.mark.parametrize("seed", range(6))
def test_the_answers_of_a_stream_are_those_of_single_calls_in_the_order_of_the_requests(served, seed):
    rng = random.Random(seed)
    kinds = [rng.choice(list(KINDS) if rng.random() < 0.5 else ["plain"]) for _ in range(120)]
    requests = [KINDS[kind](float(20 + number % 30)) for number, kind in enumerate(kinds)]
    answers = list(served.stream(requests))
    assert len(answers) == len(requests)
    for kind, request, answer in zip(kinds, requests, answers, strict=True):
        status, text, wanted = alone(served, request)
        assert answer.infer_response.parameters["triton_final_response"].bool_param
        assert answer.infer_response.parameters["error_code"].string_param == status, kind
        if status == "INTERNAL":  # a bug's text holds an id of its own
            assert answer.error_message.startswith("internal error ")
        else:
            assert answer.error_message == text, kind
        answer.infer_response.parameters.pop("error_code", None)
        assert settled(answer.infer_response) == wanted, kind
        if not status:
            assert all(name in answer.infer_response.parameters for name in TIMES)


def test_each_request_is_counted_as_if_alone(served):
    def streams(family, *more):
        return family.labels("bidi_stream", "inference.GRPCInferenceService", "ModelStreamInfer", *more).value

    metrics = served.server.metrics
    before, statistics = counts(served), served.server.repository.models["plain", 1].monitor.statistics
    sums = [statistics.success.ns, statistics.queue.ns, statistics.compute_infer.ns]
    received, sent = streams(metrics.rpc_received), streams(metrics.rpc_sent)
    answers = held(served, rows(range(12)), 12)
    served.on_loop(batcher(served).release)
    found = list(answers)
    assert [values_of(answer.infer_response)[0, 0] for answer in found] == [2 * n for n in range(12)]
    assert gained(served, before) == {
        "OK": 12, "durations": 12, "waits": 12, "success": 12, "inferences": 12
    }  # fmt: skip
    own = {name: [answer.infer_response.parameters[name].int64_param for answer in found] for name in TIMES}
    assert statistics.queue.ns - sums[1] == sum(own["queue_ns"])
    assert statistics.compute_infer.ns - sums[2] == sum(own["compute_ns"])
    assert statistics.success.ns - sums[0] > sum(own["queue_ns"]) + sum(own["compute_ns"])
    assert (streams(metrics.rpc_received), streams(metrics.rpc_sent)) == (received + 12, sent + 12)


def test_a_row_that_breaks_the_model_fails_alone(served):
    before = counts(served)
    answers = held(served, rows([1, 2, BAD, 4, 5]), 5)
    served.on_loop(batcher(served).release)
    found = list(answers)
    assert [answer.infer_response.id for answer in found] == ["1", "2", "13", "4", "5"]
    assert [answer.infer_response.parameters["error_code"].string_param for answer in found] == [
        "", "", "INTERNAL", "", ""
    ]  # fmt: skip
    assert [values_of(found[at].infer_response)[0, 0] for at in (0, 1, 3, 4)] == [2, 4, 8, 10]
    gain = gained(served, before)
    assert (gain["OK"], gain["INTERNAL"], gain["durations"], gain["fail"]) == (4, 1, 5, 1)


def test_what_a_full_queue_refuses_is_answered_in_its_place(served):
    before = counts(served, "small")
    answers = held(served, rows(range(7), "small"), 4, "small")
    wait_until(served, lambda: counts(served, "small")["queue_full"] == before["queue_full"] + 3)
    served.on_loop(batcher(served, "small").release)
    found = list(answers)
    assert [answer.infer_response.id for answer in found] == [str(n) for n in range(7)]
    assert [bool(answer.error_message) for answer in found] == [False] * 4 + [True] * 3
    assert all("queue of model 'small' is full" in answer.error_message for answer in found[4:])
    assert gained(served, before, "small") == {
        "OK": 4, "UNAVAILABLE": 3, "queue_full": 3, "durations": 7, "waits": 4, "success": 4, "fail": 3, "inferences": 4
    }  # fmt: skip


def test_one_request_makes_room_for_another_caller_and_not_all_that_came_with_it(served):
    before = counts(served, "small")
    answers = held(served, rows(range(4), "small"), 4, "small")
    method = INFERENCE["ModelInfer"]
    with grpc.insecure_channel(served.url, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        ask = channel.unary_unary(method.path, method.request.SerializeToString, method.response.FromString)
        other = ask.future(rows([50], "small")[0], timeout=30)
        wait_until(served, lambda: counts(served, "small")["queue_full"] == before["queue_full"] + 1)
        served.on_loop(batcher(served, "small").release)
        assert values_of(other.result())[0, 0] == 100
    found = list(answers)
    assert [answer.infer_response.id for answer in found] == ["0", "1", "2", "3"]
    assert ["made room for another's" in answer.error_message for answer in found] == [False, False, False, True]
    gain = gained(served, before, "small")
    assert (gain["OK"], gain["UNAVAILABLE"], gain["durations"], gain["waits"]) == (4, 1, 5, 4)


def test_a_deadline_in_the_middle_ends_the_stream_after_its_answers(served):
    before, gate = counts(served), iter(rows(range(3)))
    answers = served.stream(gate, timeout=30)
    assert [next(answers).infer_response.id for _ in range(3)] == ["0", "1", "2"]
    assert list(answers) == []
    late = held(served, rows(range(5)), 5, timeout=1.0)
    with pytest.raises(grpc.RpcError) as raised:
        next(late)
    assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert gained(served, before) == {
        "OK": 3, "DEADLINE_EXCEEDED": 5, "deadline": 5, "late": 5, "durations": 8, "waits": 3, "success": 3, "fail": 5,
        "inferences": 3,
    }  # fmt: skip
    served.on_loop(batcher(served).release)


def test_a_caller_that_leaves_is_counted_once_for_each_request(served):
    before = counts(served)
    answers = held(served, rows(range(6)), 6)
    answers.cancel()
    wait_until(served, lambda: batcher(served).queued_rows == 0)
    assert gained(served, before) == {"CANCELLED": 6, "gone": 6, "durations": 6, "fail": 6}
    served.on_loop(batcher(served).release)


def test_with_the_callers_header_the_answers_before_an_error_come_and_none_after_it(served):
    answers = held(served, rows([1, 2, BAD, 4]), 4, metadata=(("triton_grpc_error", "true"),))
    served.on_loop(batcher(served).release)
    assert [next(answers).infer_response.id for _ in range(2)] == ["1", "2"]
    with pytest.raises(grpc.RpcError) as raised:
        next(answers)
    assert raised.value.code() is grpc.StatusCode.INTERNAL


def test_what_comes_in_one_read_is_queued_as_few_works():
    """Each has as many rows as a forward takes, and a message of another kind leaves the others together."""
    requests = rows(range(38))
    requests[20] = typed(20)
    body = b"".join(message(request.SerializeToString()) for request in requests)
    with numeric({"plain": Model(twice, **FIXED)}, front_end="direct") as served, Peer(served.server.grpc_port) as peer:
        served.on_loop(batcher(served).hold)
        peer.headers(1, call_headers("ModelStreamInfer"))
        peer.data(1, body, end=True)
        wait_until(served, lambda: batcher(served).queued_rows == 38)
        works = served.on_loop(lambda: [(work.rows, work.requests) for work in batcher(served)._queue])
        served.on_loop(batcher(served).release)
        reply = peer.answer(1)
    assert works == [(16, 16), (16, 16), (5, 5), (1, 1)]
    assert reply.status == 0
    found = [ModelStreamInferResponse.FromString(raw).infer_response.id for raw in reply.messages]
    assert found == [str(n) for n in range(38)]
