"""Runs in the environment of the stock tritonclient: `calls URL`, `infer URL DIR` or `threads URL DIR`."""

import pathlib
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException


def asked(name, values, outputs=()):
    tensor = triton.InferInput("image", values.shape, "FP32")
    tensor.set_data_from_numpy(values)
    return {
        "model_name": name,
        "inputs": [tensor],
        "outputs": [triton.InferRequestedOutput(o) for o in outputs] or None,
    }


def refusal(client, values):
    try:
        client.infer(**asked("mnist", values))
    except InferenceServerException as error:
        return error
    raise AssertionError("a wrong shape was answered")


def calls(url):
    with triton.InferenceServerClient(url) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("mnist")
        assert not client.is_model_ready("nothing")
        assert client.get_server_metadata().name == "layercast"
        assert client.get_model_metadata("mnist").inputs[0].shape == [-1, 1, 28, 28]
        config = client.get_model_config("mnist", as_json=True)["config"]
        assert config["max_batch_size"] == 16
        assert config["input"][0]["data_type"] == "TYPE_FP32"
        assert {m.name for m in client.get_model_repository_index().models} == {
            "mnist",
            "resnet",
            "transformer",
            "shared",
        }
        x = np.random.default_rng(0).random((3, 1, 28, 28), dtype="f4")
        before = client.get_inference_statistics("mnist").model_stats[0].inference_count
        result = client.infer(**asked("mnist", x, ["layer:net.0", "logits"]), request_id="42", client_timeout=30)
        assert result.as_numpy("logits").shape == (3, 10)
        assert result.as_numpy("layer:net.0").shape == (3, 512)
        assert result.get_response().id == "42"
        assert client.get_inference_statistics("mnist").model_stats[0].inference_count == before + 3
        answers = []
        arrived = threading.Event()

        def keep(result, error):
            answers.append((result, error))
            arrived.set()

        client.async_infer(**asked("mnist", x), callback=keep)
        assert arrived.wait(30)
        assert answers[0][1] is None
        assert answers[0][0].as_numpy("logits").shape == (3, 10)
        for values, message in (
            (x[:, :, :9], "want shape [-1, 1, 28, 28]"),
            (x[0], "the first dimension is the batch"),
        ):
            error = refusal(client, values)
            assert error.status() == "StatusCode.INVALID_ARGUMENT", error.status()
            assert message in error.message(), error.message()
    print("every call works")


def infer(url, directory):
    with triton.InferenceServerClient(url) as client:
        result = client.infer(**asked("mnist", np.load(directory / "x.npy")))
        np.save(directory / "logits.npy", result.as_numpy("logits"))


def from_threads(url, directory):
    x, sizes = np.load(directory / "x.npy"), np.random.default_rng(0).integers(1, 65, 10_000)
    ends = np.minimum(np.cumsum(sizes), len(x))
    spans = [(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True) if start < end]
    with triton.InferenceServerClient(url) as client, ThreadPoolExecutor(16) as pool:
        parts = pool.map(lambda span: client.infer(**asked("mnist", x[slice(*span)])).as_numpy("logits"), spans)
        np.save(directory / "logits.npy", np.concatenate(list(parts)))


if __name__ == "__main__":
    what, url, *rest = sys.argv[1:]
    {"calls": calls, "infer": infer, "threads": from_threads}[what](url, *map(pathlib.Path, rest))
