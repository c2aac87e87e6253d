"""Runs in the environment of the stock tritonclient: `calls URL`, `stream URL`, `infer URL DIR` or `threads URL DIR`."""

import pathlib
import queue
import sys
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


def refusal(call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except InferenceServerException as error:
        return error
    raise AssertionError(f"{call.__name__} was answered")


def pictures(rows):
    return np.random.default_rng(0).random((rows, 1, 28, 28), dtype="f4")


def questions(client):
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("mnist")
    assert client.is_model_ready("mnist", "1")
    assert not client.is_model_ready("nothing")
    metadata = client.get_server_metadata()
    assert metadata.name == "layercast"
    assert {"classification", "statistics", "trace", "logging"} <= set(metadata.extensions)
    assert client.get_model_metadata("mnist").inputs[0].shape == [-1, 1, 28, 28]
    config = client.get_model_config("mnist", as_json=True)["config"]
    assert config["max_batch_size"] == 16
    assert config["input"][0]["data_type"] == "TYPE_FP32"
    models = {"mnist", "resnet", "transformer", "shared"}
    assert {m.name for m in client.get_model_repository_index().models} == models
    assert {s.name for s in client.get_inference_statistics().model_stats} == models


def administration(client):
    assert client.get_trace_settings(as_json=True)["settings"]["trace_level"]["value"] == ["OFF"]
    client.update_trace_settings(model_name="mnist", settings={"trace_level": "OFF"})
    assert (
        refusal(client.update_trace_settings, settings={"trace_level": "TIMESTAMPS"}).status().endswith("UNIMPLEMENTED")
    )
    level = client.get_log_settings(as_json=True)["settings"]["log_verbose_level"]["uint32_param"]
    client.update_log_settings({"log_verbose_level": 1})
    assert client.get_log_settings(as_json=True)["settings"]["log_verbose_level"]["uint32_param"] == 1
    client.update_log_settings({"log_verbose_level": level})
    assert not client.get_system_shared_memory_status().regions
    assert not client.get_cuda_shared_memory_status().regions
    client.unregister_system_shared_memory()
    client.unregister_cuda_shared_memory()
    error = refusal(client.register_system_shared_memory, "mine", "/mine", 64)
    assert error.status().endswith("PERMISSION_DENIED"), error.status()


def inference(client):
    x = pictures(3)
    before = client.get_inference_statistics("mnist").model_stats[0].inference_count
    result = client.infer(**asked("mnist", x, ["layer:net.0", "logits"]), request_id="42", client_timeout=30)
    assert result.as_numpy("logits").shape == (3, 10)
    assert result.as_numpy("layer:net.0").shape == (3, 512)
    assert result.get_response().id == "42"
    assert client.get_inference_statistics("mnist").model_stats[0].inference_count == before + 3
    answers = queue.Queue()
    parameters = {"text": "a", "flag": True, "number": -5, "ratio": 0.5}
    client.async_infer(
        **asked("mnist", x), callback=lambda result, error: answers.put((result, error)), parameters=parameters
    )
    answer, error = answers.get(timeout=30)
    assert error is None
    assert answer.as_numpy("logits").shape == (3, 10)
    for values, message in (
        (x[:, :, :9], "want shape [-1, 1, 28, 28]"),
        (x[0], "the first dimension is the batch"),
    ):
        error = refusal(client.infer, **asked("mnist", values))
        assert error.status() == "StatusCode.INVALID_ARGUMENT", error.status()
        assert message in error.message(), error.message()
    assert refusal(client.infer, **asked("nothing", x)).status() == "StatusCode.NOT_FOUND"
    assert refusal(client.infer, **asked("mnist", x), sequence_id=7).status() == "StatusCode.UNIMPLEMENTED"


def classification(client):
    x = pictures(3)
    wanted = {**asked("mnist", x), "outputs": [triton.InferRequestedOutput("logits", class_count=3)]}
    found = client.infer(**wanted).as_numpy("logits")
    logits = client.infer(**asked("mnist", x)).as_numpy("logits")
    assert found.shape == (3, 3)
    for row, scores in zip(found, logits, strict=True):
        parts = [element.decode().split(":") for element in row]
        assert [int(index) for _, index, _ in parts] == np.argsort(-scores)[:3].tolist()
        assert [label for _, index, label in parts] == [index for _, index, _ in parts]
        np.testing.assert_allclose([float(score) for score, _, _ in parts], -np.sort(-scores)[:3], rtol=1e-5)


def calls(url):
    with triton.InferenceServerClient(url) as client:
        for check in (questions, administration, inference, classification):
            check(client)
    print("every call works")


def stream(url):
    """Two hundred requests on one stream, the hundredth wrong; then a stream that the first error ends."""
    x = pictures(200)
    for strict in (False, True):
        answers = queue.Queue()
        with triton.InferenceServerClient(url) as client:
            headers = {"triton_grpc_error": "true"} if strict else None
            client.start_stream(callback=lambda result, error, to=answers: to.put((result, error)), headers=headers)
            for number in range(200):
                rows = x[number] if number == 100 else x[number : number + 1]
                client.async_stream_infer(
                    **asked("mnist", rows), request_id=str(number), enable_empty_final_response=True
                )
            got = [answers.get(timeout=60) for _ in range(101 if strict else 200)]
            client.stop_stream()
        for number, (result, error) in enumerate(got):
            if number == 100:
                assert "the first dimension is the batch" in error.message(), error
                assert not strict or error.status() == "StatusCode.INVALID_ARGUMENT", error.status()
            else:
                response = result.get_response()
                assert response.id == str(number)
                assert response.parameters["triton_final_response"].bool_param
                assert result.as_numpy("logits").shape == (1, 10)
    print("streams work")


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
    {"calls": calls, "stream": stream, "infer": infer, "threads": from_threads}[what](url, *map(pathlib.Path, rest))
