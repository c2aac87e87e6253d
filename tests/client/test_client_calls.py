"""Client and AsyncClient against a real server; each test runs for both."""

import asyncio
import gc
import inspect
import socket
import threading
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest

import layercast.client as lc
from layercast.proto.messages import ExtractRequest, ModelInferRequest, ModelMetadataRequest

Connect = Callable[..., Any]


# --------------------------------------------------------------------------------------------------------- predict


def test_a_model_with_one_output_returns_the_array(client: Any, server: Any) -> None:
    image = np.zeros((3, 1, 28, 28), np.float32)
    image[1, 0, 0, :2] = 1
    logits = client.predict("mnist", image, id="abc", version="2")
    assert (logits.shape, logits.dtype) == ((3, 10), np.float32)
    assert logits.argmax(axis=1).tolist() == [0, 2, 0]
    (sent,) = server.asked(ModelInferRequest)
    assert (sent.id, sent.model_version, list(sent.outputs)) == ("abc", "2", [])


def test_a_model_with_several_outputs_returns_a_dict(client: Any) -> None:
    answer = client.predict("pair", {"b": [[1, 2]], "a": [[0.5, 1.5]]})
    assert {name: array.tolist() for name, array in answer.items()} == {
        "sum": [[1.5, 3.5]],
        "difference": [[-0.5, -0.5]],
    }


def test_outputs_by_name_and_by_list(client: Any) -> None:
    inputs = {"a": [[0.5, 1.5]], "b": [[1, 2]]}
    assert client.predict("pair", inputs, outputs="difference").tolist() == [[-0.5, -0.5]]
    assert list(client.predict("pair", inputs, outputs=["sum"])) == ["sum"]
    assert list(client.predict("mnist", np.zeros((1, 1, 28, 28), "f4"), outputs=["logits"])) == ["logits"]


def test_typed_answers_are_read(client: Any) -> None:
    assert client.predict("typed", np.zeros(1)).tolist() == [-1, 2**40]


def test_metadata_is_asked_for_once_and_again_after_a_refusal(client: Any, server: Any) -> None:
    for _ in range(3):
        client.predict("mnist", np.zeros((1, 1, 28, 28), "f4"))
    client.features("mnist", np.zeros((1, 1, 28, 28), "f4"), "net.0")
    assert len(server.asked(ModelMetadataRequest)) == 1
    client.metadata("mnist")
    assert len(server.asked(ModelMetadataRequest)) == 2


@pytest.mark.parametrize(
    ("datatype", "value", "back"),
    [
        ("BOOL", [[True, False]], [[True, False]]),
        ("UINT8", np.array([[0, 255]], "u1"), [[0, 255]]),
        ("UINT8", [[0, 255]], [[0, 255]]),
        ("INT32", np.array([[-(2**31), 2**31 - 1]]), [[-(2**31), 2**31 - 1]]),
        ("INT64", np.array([[2**32 - 1]], "u4"), [[2**32 - 1]]),
        ("FP32", [[1, 2]], [[1.0, 2.0]]),
        ("FP32", np.array([[0, 255]], "u1"), [[0.0, 255.0]]),
        ("FP32", np.array([[0.1]], "f8"), [[float(np.float32(0.1))]]),
        ("FP32", np.array([[np.inf, 1.0]]), [[np.inf, 1.0]]),
        ("FP32", np.array([[1.5]], ">f4"), [[1.5]]),
        ("FP16", np.array([[0.5]], "f8"), [[0.5]]),
        ("FP64", np.array([[0.5]], "f2"), [[0.5]]),
        ("BF16", np.array([[1.0]], "f8"), [[1.0]]),
        ("BYTES", [["hé", "\0"]], [["hé".encode(), b"\0"]]),
        ("BYTES", np.array([[b"a\0", b""]], object), [[b"a\0", b""]]),
    ],
)
def test_values_that_fit_are_converted(client: Any, datatype: str, value: Any, back: list[Any]) -> None:
    assert client.predict(f"echo_{datatype}", value).tolist() == back


@pytest.mark.parametrize(
    ("datatype", "value", "text"),
    [
        ("INT32", np.array([[2**31]]), "2147483648 is out of its range"),
        ("INT32", np.array([[1.0]]), r"is INT32, got an array of float64: convert it with .astype\('int32'\)"),
        ("UINT8", [[-1]], "-1 is out of its range"),
        ("FP32", np.array([[2**24 + 1]]), "beyond 16777216 lose digits"),
        ("FP32", np.array([[1e300]]), r"1e\+300 is out of its range"),
        ("FP16", np.array([[70000.0]], "f4"), "70000.0 is out of its range"),
        ("BOOL", [[1]], "got an array of int64"),
        ("FP32", [["a"]], "pass numbers of type float32"),
        ("FP32", [[1j]], "pass numbers"),
        ("FP32", [[1], [2, 3]], "does not convert to a numpy array"),
        ("BYTES", [[1.5]], "input 'x': BYTES elements are bytes or str, got float"),
        ("BYTES", np.array([[None]], object), "bytes or str, got NoneType"),
    ],
)
def test_values_that_would_change_are_refused_before_sending(
    client: Any, server: Any, datatype: str, value: Any, text: str
) -> None:
    with pytest.raises(lc.InvalidArgument, match=text):
        client.predict(f"echo_{datatype}", value)
    assert server.asked(ModelInferRequest) == []


def test_wrong_inputs_are_explained(client: Any) -> None:
    with pytest.raises(lc.InvalidArgument, match="inputs of model 'pair' are 'a', 'b': pass a dict"):
        client.predict("pair", np.zeros((1, 2)))
    with pytest.raises(lc.InvalidArgument, match="model 'pair' has no input 'c'; its inputs are 'a', 'b'"):
        client.predict("pair", {"a": [[0, 0]], "c": [[0, 0]]})


@pytest.mark.parametrize("layout", ["fortran", "sliced", "reversed", "transposed"])
def test_the_logical_array_is_sent(client: Any, layout: str) -> None:
    base = np.arange(48, dtype="f4").reshape(6, 8)
    array = {
        "fortran": np.asfortranarray(base),
        "sliced": base[::2, 1::3],
        "reversed": base[::-1, ::-1],
        "transposed": base.T,
    }[layout]
    assert client.predict("echo_FP32", array).tolist() == [[float(x) for x in row] for row in array]


def test_answers_are_independent_of_later_ones(client: Any) -> None:
    first = client.predict("echo_FP32", [[1.0]])
    client.predict("echo_FP32", [[2.0]])
    gc.collect()
    assert first.tolist() == [[1.0]]


# -------------------------------------------------------------------------------------------------- the other calls


def test_features(client: Any, server: Any) -> None:
    image = np.zeros((2, 1, 28, 28))
    answer = client.features("mnist", image, ["net.*", "net.1@max"], reduce="mean", outputs=["logits"], id="f")
    assert list(answer) == ["net.*@mean", "net.1@max", "logits"]
    assert answer["net.*@mean"].dtype == np.float16
    assert answer["net.*@mean"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert answer["logits"].tolist() == [True, True]
    (sent,) = server.asked(ExtractRequest)
    assert (sent.id, sent.inputs[0].name, sent.inputs[0].datatype) == ("f", "image", "FP32")
    assert sent.inputs[0].data == bytes(2 * 784 * 4)
    assert list(client.features("mnist", image, "net.0")) == ["net.0"]


def test_a_layer_named_like_an_output_is_not_lost(client: Any) -> None:
    with pytest.raises(lc.LayercastError, match="'logits' is given twice"):
        client.features("mnist", np.zeros((1, 1, 28, 28)), "logits", outputs="logits")


def test_layers(client: Any) -> None:
    linear, fused = client.layers("mnist")
    assert linear == lc.LayerInfo("net.0", "Linear", "FP32", (-1, 512), 0, 401920, True, "")
    assert (fused.available, fused.reason, fused.order) == (False, "never runs", 1)
    assert [layer.path for layer in client.layers("mnist", "net.0")] == ["net.0"]


def test_models_and_metadata(client: Any) -> None:
    bad, good = client.models()
    assert (bad.name, bad.version, bad.state, bad.reason.startswith("weights differ")) == (
        "mnist",
        "1",
        "UNAVAILABLE",
        True,
    )
    assert good == lc.ModelInfo("mnist", "2", "READY", "")
    metadata = client.metadata("mnist")
    assert metadata.inputs == (lc.TensorInfo("image", "FP32", (-1, 1, 28, 28)),)
    assert metadata.labels == tuple("0123456789")
    assert metadata.preprocessing is not None
    assert metadata.preprocessing["width"] == 28
    assert metadata.description == "digits"
    bare = client.metadata("pair")
    assert (bare.labels, bare.preprocessing, bare.description) == ((), None, "")


def test_states(client: Any) -> None:
    assert client.is_live() is True
    assert client.is_ready() is False
    assert client.is_model_ready("mnist") is True
    assert client.is_model_ready("nothing") is False


# ----------------------------------------------------------------------------------------------------------- errors

STATUSES = {
    "INVALID_ARGUMENT": lc.InvalidArgument,
    "NOT_FOUND": lc.NotFound,
    "DEADLINE_EXCEEDED": lc.DeadlineExceeded,
    "UNAVAILABLE": lc.Unavailable,
    "RESOURCE_EXHAUSTED": lc.ResourceExhausted,
    "FAILED_PRECONDITION": lc.FailedPrecondition,
    "UNIMPLEMENTED": lc.Unimplemented,
    "INTERNAL": lc.InternalError,
    "CANCELLED": lc.Cancelled,
    "PERMISSION_DENIED": lc.PermissionDenied,
    "UNAUTHENTICATED": lc.Unauthenticated,
    "DATA_LOSS": lc.LayercastError,
}


@pytest.mark.parametrize("status", STATUSES)
def test_the_class_is_the_status_and_the_text_is_the_servers(client: Any, status: str) -> None:
    with pytest.raises(lc.LayercastError) as caught:
        client.metadata(f"fail:{status}")
    assert type(caught.value) is STATUSES[status]
    assert caught.value.code is grpc.StatusCode[status]
    assert str(caught.value) == f"the server's own text about fail:{status}"


def test_a_refusal_forgets_the_metadata(client: Any, server: Any) -> None:
    image = np.zeros((1, 1, 28, 28))
    client.predict("mnist", image)
    described = server.models.pop("mnist")
    with pytest.raises(lc.NotFound, match="Request for unknown model: 'mnist' is not found"):
        client.predict("mnist", image)
    server.models["mnist"] = described
    client.predict("mnist", image)
    assert [request.name for request in server.asked(ModelMetadataRequest)] == ["mnist", "mnist"]


def test_an_unreachable_server_is_named_with_the_cure(connect: Connect) -> None:
    with socket.socket() as unused:
        unused.bind(("localhost", 0))
        client = connect(f"localhost:{unused.getsockname()[1]}")
        with pytest.raises(lc.Unavailable) as caught:
            client.models()
        assert "no server answers at localhost:" in str(caught.value)
        assert "layercast serve" in str(caught.value)
        assert client.is_live() is False
        assert client.is_ready() is False
        assert client.is_model_ready("mnist") is False


def test_the_deadline_is_the_clients_or_the_calls(connect: Connect, server: Any) -> None:
    for client, options in ((connect(server.url, timeout=0.2), {}), (connect(server.url), {"timeout": 0.2})):
        with pytest.raises(lc.DeadlineExceeded, match=r"no answer from localhost:\d+ within 0.2 s") as caught:
            client.predict("slow", np.zeros(1), **options)
        assert isinstance(caught.value, TimeoutError)


def test_answers_beyond_grpcs_own_limit_arrive(client: Any) -> None:
    assert client.predict("large", np.zeros(1)).shape == (5 << 20,)
    image = np.zeros((1, 5 << 20 >> 2), "f4")
    assert client.predict("echo_FP32", image).nbytes == 5 << 20


def test_limits_are_the_clients_own(connect: Connect, server: Any) -> None:
    client = connect(server.url, max_message_bytes=1 << 20)
    with pytest.raises(
        lc.ResourceExhausted, match=r"the request has 20000\d\d bytes, this client sends at most 1048576"
    ):
        client.predict("echo_UINT8", np.zeros((1, 2_000_000), "u1"))
    with pytest.raises(lc.ResourceExhausted, match="pass a larger max_message_bytes"):
        client.predict("large", np.zeros(1))


def test_a_malformed_answer_is_the_servers_fault(client: Any) -> None:
    with pytest.raises(lc.InternalError, match=r"answer of model 'malformed' is malformed: output 'y': FP32 of shape"):
        client.predict("malformed", np.zeros(1))


def test_headers_go_along(connect: Connect, server: Any) -> None:
    connect(server.url, headers={"authorization": "Bearer x"}).is_live()
    assert server.headers[-1]["authorization"] == "Bearer x"


def test_a_closed_client_says_so(client: Any) -> None:
    client.is_live()
    client.close()
    with pytest.raises(lc.LayercastError, match="this client is closed"):
        client.is_live()
    client.close()


@pytest.mark.parametrize("url", ["", "http://localhost:8000/v2", "ftp://localhost:1", "a/b"])
def test_urls_that_are_no_address_are_refused(connect: Connect, url: str) -> None:
    with pytest.raises(ValueError, match="host:port"):
        connect(url)


def test_a_scheme_is_tolerated(connect: Connect, server: Any) -> None:
    assert connect(f"grpc://{server.url}/").is_live()


def test_a_proxy_in_the_environment_is_not_asked_for_loopback(
    connect: Connect, server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://localhost:9")
    assert connect(server.url).is_live()


# ------------------------------------------------------------------------------------------------------ concurrency


def test_threads_share_a_client(server: Any) -> None:
    wrong: list[int] = []

    def ask(client: lc.Client, number: int) -> None:
        for step in range(20):
            value = number * 1000 + step
            if client.predict("echo_INT64", [[value]]).tolist() != [[value]]:
                wrong.append(value)

    with lc.Client(server.url) as client:
        threads = [threading.Thread(target=ask, args=(client, number)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_tasks_share_a_client(server: Any) -> None:
    async def main() -> list[Any]:
        async with lc.AsyncClient(server.url) as client:
            return await asyncio.gather(*(client.predict("echo_INT64", [[number]]) for number in range(50)))

    assert [answer.item() for answer in asyncio.run(main())] == list(range(50))


def test_a_cancelled_task_cancels_its_call(server: Any) -> None:
    async def main() -> None:
        async with lc.AsyncClient(server.url, timeout=None) as client:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(client.predict("slow", np.zeros(1)), 0.2)
            assert await client.is_live()

    asyncio.run(main())


def test_both_clients_have_the_same_methods() -> None:
    def parameters(method: Any) -> list[Any]:
        return [(each.name, each.kind, each.default) for each in inspect.signature(method).parameters.values()]

    for name, method in inspect.getmembers(lc.Client, inspect.isfunction):
        if not name.startswith("_"):
            assert parameters(method) == parameters(getattr(lc.AsyncClient, name)), name
