"""Layers as a stream: the values of Extract in bounded messages, no more computed than is read, every way to end."""

import asyncio
from contextlib import aclosing

import grpc
import numpy as np
import pytest
import tiny
from serving import running
from test_server_features import EXTRACTED, arrays, extract
from test_server_inference import INPUTS, assert_answers, request, rows_for, wait_until

from layercast.client import AsyncClient, Client, InvalidArgument
from layercast.client.errors import InternalError
from layercast.client.joining import Joining
from layercast.models.hooks import registered_hooks
from layercast.proto.messages import ExtractStreamRequest, ExtractStreamResponse
from layercast.server.errors import ServingError
from layercast.server.service.call import Call, method_of
from layercast.server.service.feature_stream import FeatureStreamService

MESSAGE = 64 << 20


def asked(model: str, values: np.ndarray, layers, outputs=(), chunk_bytes: int = 0, **fields) -> ExtractStreamRequest:
    message = ExtractStreamRequest(chunk_bytes=chunk_bytes)
    message.extract.model_name = model
    message.extract.layers.extend(layers)
    message.extract.outputs.extend(outputs)
    datatype = "INT64" if model == "transformer" else "FP32"
    message.extract.inputs.add(name=INPUTS[model], datatype=datatype, shape=values.shape, data=values.tobytes())
    for name, value in fields.items():
        setattr(message.extract, name, value)
    return message


def stream(served, message: ExtractStreamRequest, timeout: float = 30.0):
    return served.rpc("ExtractStream")(message, timeout=timeout)


def joined(messages) -> dict[str, np.ndarray]:
    """Put the parts where they say they belong, by nothing but what the messages say."""
    found: dict[str, dict[int, bytearray]] = {}
    kinds: dict[str, tuple[str, tuple[int, ...]]] = {}
    for message in messages:
        for part in (*message.layers, *message.outputs):
            kinds[part.name] = part.datatype, tuple(part.shape[1:])
            block = found.setdefault(part.name, {}).setdefault(message.first_row, bytearray())
            assert part.offset == len(block)
            block += part.data
    return {
        name: np.frombuffer(b"".join(blocks[row] for row in sorted(blocks)), EXTRACTED[kinds[name][0]]).reshape(
            -1, *kinds[name][1]
        )
        for name, blocks in found.items()
    }


def entry(served, model: str):
    return served.server.repository.find(model, "")


def ended(served, model: str, code: str) -> float:
    return served.server.metrics.requests.labels(model, "1", "features", code).value


@pytest.mark.parametrize("chunk_bytes", [4096, 100_000, 0])
@pytest.mark.parametrize(("model", "output"), [("mnist", "logits"), ("transformer", "logits"), ("shared", "output")])
def test_joined_it_is_what_extract_answers(served, model, output, chunk_bytes):
    x = rows_for(model, 37)  # three forwards of 16 rows at most
    whole = extract(served, model, x, ["*"], [output])
    messages = list(stream(served, asked(model, x, ["*"], [output], chunk_bytes, id="s-1")))
    got, wanted = joined(messages), arrays((*whole.layers, *whole.outputs))
    assert list(got) == list(wanted)
    for name, values in wanted.items():
        np.testing.assert_allclose(got[name], values, atol=1e-5, rtol=1e-5, err_msg=name)
    row = 0
    for message in messages:
        assert (message.id, message.model_version, message.total_rows, message.first_row) == ("s-1", "1", 37, row)
        assert sum(len(part.data) for part in (*message.layers, *message.outputs)) <= (chunk_bytes or 2 << 20)
        assert message.timing.batch_rows >= message.rows
        row += 0 if message.partial else message.rows
    assert row == 37


def test_an_answer_larger_than_a_message_comes_with_little_computed_ahead(served, slow_reader):
    """Of 12 rows, 9 MB each, one runs at a time. While one is left unread, the next but one does not run."""
    x, model = rows_for("resnet", 12), entry(served, "resnet")
    before = model.monitor.statistics.inferences
    with pytest.raises(grpc.RpcError, match="take the layers in parts") as raised:
        extract(served, "resnet", x, ["*"])
    assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    messages = slow_reader(asked("resnet", x, ["*"]))
    first = next(messages)
    wait_until(served, lambda: model.monitor.statistics.inferences >= before + 2)
    # Rows that were waiting would run before these, which come later.
    served.call("ModelInfer", request("resnet", x[:1], ["layer:bn@mean"]))
    assert model.monitor.statistics.inferences - before - 1 == 2
    rest = list(messages)
    assert first.ByteSize() + sum(message.ByteSize() for message in rest) > MESSAGE
    assert model.monitor.statistics.inferences - before - 1 == 12
    got = joined([first, *rest])
    alone = arrays(extract(served, "resnet", x[9:10], ["*"]).layers)
    for name, values in alone.items():
        np.testing.assert_allclose(got[name][9:10], values, atol=1e-4, rtol=1e-4, err_msg=name)


def test_a_caller_who_leaves_stops_the_computing(served, modules, slow_reader):
    x, model = rows_for("resnet", 12), entry(served, "resnet")
    before, gone = model.monitor.statistics.inferences, ended(served, "resnet", "CANCELLED")
    messages = slow_reader(asked("resnet", x, ["*"]))
    next(messages)
    messages.cancel()
    wait_until(served, lambda: ended(served, "resnet", "CANCELLED") == gone + 1)
    served.call("ModelInfer", request("resnet", x[:1], ["layer:bn@mean"]))
    assert model.monitor.statistics.inferences - before - 1 <= 2
    assert model.monitor.inflight.value == 0
    assert model.batcher.queued_rows == 0
    assert registered_hooks(model.loaded.runner.eager._module) == []
    assert_answers(served, modules)


def test_an_error_in_the_middle_comes_after_the_rows_before_it(served, monkeypatch):
    module = entry(served, "mnist").loaded.runner.eager._module
    plain, calls = module.forward, []

    def fail(*inputs, **named):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("this text is for the log only")
        return plain(*inputs, **named)

    monkeypatch.setattr(module, "forward", fail)
    messages = stream(served, asked("mnist", rows_for("mnist", 40), ["net.0"], ["logits"]))
    first = next(messages)
    assert (first.first_row, first.rows) == (0, 16)
    with pytest.raises(grpc.RpcError, match="internal error") as raised:
        next(messages)
    assert raised.value.code() is grpc.StatusCode.INTERNAL


def test_a_deadline_ends_it_and_is_counted_as_one(served):
    model = entry(served, "shared")
    before = ended(served, "shared", "DEADLINE_EXCEEDED")
    served.on_loop(model.batcher.hold)
    try:
        with pytest.raises(grpc.RpcError) as raised:
            list(stream(served, asked("shared", rows_for("shared", 3), ["*"]), timeout=0.5))
        # The server's clock may be behind the caller's: what it released now would still be answered.
        wait_until(served, lambda: ended(served, "shared", "DEADLINE_EXCEEDED") == before + 1)
    finally:
        served.on_loop(model.batcher.release)
    assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert model.batcher.queued_rows == 0


def test_a_deadline_that_passes_while_nobody_reads_is_one_too(served, slow_reader):
    before = ended(served, "resnet", "DEADLINE_EXCEEDED")
    messages = slow_reader(asked("resnet", rows_for("resnet", 12), ["*"]), timeout=2.0)
    next(messages)
    wait_until(served, lambda: ended(served, "resnet", "DEADLINE_EXCEEDED") == before + 1)
    with pytest.raises(grpc.RpcError) as raised:
        list(messages)
    assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


def test_no_rows_are_one_message(served):
    (message,) = stream(served, asked("mnist", np.zeros((0, 1, 28, 28), "f4"), ["net.0", "net.2@mean"], ["logits"]))
    assert [list(part.shape) for part in (*message.layers, *message.outputs)] == [[0, 512], [0, 256], [0, 10]]
    assert (message.total_rows, message.rows, message.partial) == (0, 0, False)


def test_wrong_requests_are_refused_before_anything_runs(served, modules):
    x = rows_for("mnist", 2)
    for arguments, message in (
        ((x, ["net.0"], (), 4095), "chunk_bytes must be from 4,096 to 67,043,328, or 0"),
        ((x, ["net.0"], (), MESSAGE), "chunk_bytes must be"),
        ((x, []), "no layers are asked for"),
        ((x, ["net.88"]), "no layer 'net.88'; nearest: net"),
        ((x[:, :, :5], ["net.0"]), r"want shape \[-1, 1, 28, 28\]"),
    ):
        with pytest.raises(grpc.RpcError, match=message) as raised:
            list(stream(served, asked("mnist", *arguments)))
        assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    with pytest.raises(grpc.RpcError, match="model_name is empty"):
        list(stream(served, ExtractStreamRequest()))
    assert_answers(served, modules)


def test_values_outside_the_trained_range_are_told_once(served):
    messages = list(stream(served, asked("mnist", rows_for("mnist", 20) * 255, ["net.0"])))
    assert ["want values from 0 to 1" in message.warning for message in messages] == [True, False]


def test_the_service_is_an_async_generator_for_any_transport(served):
    """As another front end calls it: no gRPC between."""
    services = [FeatureStreamService(served.server.answering)]
    call = Call()

    async def take(message: ExtractStreamRequest, most: int) -> list[ExtractStreamResponse]:
        taken = []
        async with aclosing(method_of(services, "ExtractStream")(message, call)) as answers:
            async for answer in answers:
                taken.append(answer)
                if len(taken) == most:
                    break
        return taken

    x = rows_for("mnist", 40)
    assert [message.rows for message in served.wait(take(asked("mnist", x, ["net.0"]), 99))] == [16, 16, 8]
    gone = ended(served, "mnist", "CANCELLED")
    assert len(served.wait(take(asked("mnist", x, ["net.0"]), 1))) == 1
    assert ended(served, "mnist", "CANCELLED") == gone + 1
    with pytest.raises(ServingError, match="no layer"):
        served.wait(take(asked("mnist", x, ["net.99"]), 1))


def test_a_newer_version_leaves_a_stream_on_the_one_it_began_with(tmp_path):
    tiny.write(tmp_path, 1, seed=1)
    rows = np.random.default_rng(2).random((40, 10), dtype="f4")
    message = ExtractStreamRequest()
    message.extract.model_name = "tiny"
    message.extract.layers.append("shared#1")
    message.extract.outputs.append("output")
    message.extract.inputs.add(name="x", datatype="FP32", shape=rows.shape, data=rows.tobytes())
    with running(tmp_path, engine="eager", max_batch=8, model_control="explicit") as server:
        answers = FeatureStreamService(server.server.answering).extract_stream(message, Call())

        async def rest() -> list[ExtractStreamResponse]:
            return [answer async for answer in answers]

        first = server.wait(anext(answers))
        old = server.server.repository.find("tiny", "")
        tiny.write(tmp_path, 2, seed=2)
        tiny.load(server)
        np.testing.assert_allclose(tiny.answered(server), tiny.expected(2), atol=1e-5)
        messages = [first, *server.wait(rest())]
        assert {answer.model_version for answer in messages} == {"1"}
        np.testing.assert_allclose(joined(messages)["output"], tiny.expected(1, rows), atol=1e-5)
        server.wait(old.released())


def test_the_clients_yield_rows_as_they_come(served):
    x = rows_for("resnet", 10)
    with Client(served.url) as client:
        wanted = client.features("resnet", x, ["layer1", "layer2@mean"], outputs="logits")
        blocks = list(client.stream_features("resnet", x, ["layer1", "layer2@mean"], outputs="logits"))
        assert [len(block["layer1"]) for block in blocks] == [7, 3]
        for name, values in wanted.items():
            np.testing.assert_allclose(np.concatenate([block[name] for block in blocks]), values, atol=1e-4)
        rows = list(client.stream_features("resnet", x[:3], "layer1", chunk_bytes=50_000))
        assert [block["layer1"].shape for block in rows] == [(1, 64, 32, 32)] * 3
        np.testing.assert_allclose(np.concatenate([row["layer1"] for row in rows]), wanted["layer1"][:3], atol=1e-4)
        with pytest.raises(InvalidArgument, match="nearest: layer"):
            next(client.stream_features("resnet", x, "layer9"))
        for _ in client.stream_features("resnet", x, "layer1"):
            break  # closes the call

    async def both() -> list[int]:
        async with AsyncClient(served.url) as other:
            with pytest.raises(InvalidArgument):
                await anext(other.stream_features("resnet", x, "layer9"))
            return [len(block["layer1"]) async for block in other.stream_features("resnet", x, "layer1")]

    assert asyncio.run(both()) == [8, 2]
    wait_until(served, lambda: entry(served, "resnet").monitor.inflight.value == 0)


@pytest.mark.parametrize("lost", [0, 1, 4, -1])
def test_a_message_that_is_lost_is_noticed(served, lost):
    messages = list(stream(served, asked("mnist", rows_for("mnist", 3), ["*"], chunk_bytes=4096)))
    join_all(messages)
    del messages[lost]
    with pytest.raises(InternalError, match="a part of the answer of model 'mnist' is missing"):
        join_all(messages)


def join_all(messages: list[ExtractStreamResponse]) -> None:
    joining = Joining("mnist")
    for message in messages:
        joining.add(message)
    joining.end()
