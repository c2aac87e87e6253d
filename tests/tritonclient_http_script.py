"""Runs in the environment of the stock tritonclient: `calls URL`, `aio URL` or `infer URL DIR`, over HTTP."""

import asyncio
import pathlib
import sys

import numpy as np
import tritonclient.http as triton
from tritonclient.http import aio
from tritonclient.utils import InferenceServerException


def asked(x, binary=True, outputs=(), module=triton, **fields):
    tensor = module.InferInput("image", x.shape, "FP32")
    tensor.set_data_from_numpy(x, binary_data=binary)
    wanted = [module.InferRequestedOutput(name, binary_data=binary) for name in outputs]
    return {"model_name": "mnist", "inputs": [tensor], "outputs": wanted or None, **fields}


def metadata(client):
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("mnist")
    assert client.is_model_ready("mnist", "1")
    assert not client.is_model_ready("nothing")
    assert client.get_server_metadata()["name"] == "layercast"
    assert client.get_model_metadata("mnist")["inputs"][0]["shape"] == [-1, 1, 28, 28]
    config = client.get_model_config("mnist")
    assert (config["max_batch_size"], config["input"][0]["data_type"]) == (16, "TYPE_FP32")
    index = client.get_model_repository_index()
    assert {model["name"] for model in index} == {"mnist", "resnet", "transformer", "shared"}
    assert len(client.get_inference_statistics()["model_stats"]) == 4


def refusal(client, request):
    try:
        client.infer(**request)
    except InferenceServerException as error:
        return error
    raise AssertionError("a wrong request was answered")


def errors(client, x):
    for binary in (True, False):
        for request, status, text in (
            (asked(x[:, :, :9], binary), "400", "want shape [-1, 1, 28, 28]"),
            (asked(x[0], binary), "400", "the first dimension is the batch"),
            (asked(x, binary) | {"model_name": "nothing"}, "404", "unknown model"),
        ):
            error = refusal(client, request)
            assert error.status() == status, error.status()
            assert text in error.message(), error.message()


def calls(url):
    x = np.random.default_rng(0).random((3, 1, 28, 28), dtype="f4")
    with triton.InferenceServerClient(url, concurrency=4) as client:
        metadata(client)
        before = client.get_inference_statistics("mnist")["model_stats"][0]["inference_count"]
        first = client.infer(**asked(x, request_id="42"))
        assert first.get_response()["id"] == "42"
        expected = first.as_numpy("logits")
        assert client.get_inference_statistics("mnist")["model_stats"][0]["inference_count"] == before + 3
        for binary in (True, False):
            for packing in (None, "gzip", "deflate"):
                result = client.infer(
                    **asked(x, binary, ["layer:net.0", "logits"]),
                    request_compression_algorithm=packing,
                    response_compression_algorithm=packing,
                )
                np.testing.assert_allclose(result.as_numpy("logits"), expected, atol=1e-5)
                assert result.as_numpy("layer:net.0").shape == (3, 512)
        pending = [client.async_infer(**asked(x[:1], number % 2 == 0)) for number in range(40)]
        for request in pending:
            np.testing.assert_allclose(request.get_result().as_numpy("logits"), expected[:1], atol=1e-5)
        assert client.infer(**asked(x[:0])).as_numpy("logits").shape == (0, 10)
        errors(client, x)
    print("every call works")


async def asynchronous(url):
    x = np.random.default_rng(0).random((3, 1, 28, 28), dtype="f4")
    async with aio.InferenceServerClient(url) as client:
        assert await client.is_server_ready()
        assert await client.is_model_ready("mnist")
        both = await asyncio.gather(*(client.infer(**asked(x, binary, module=aio)) for binary in (True, False)))
        np.testing.assert_allclose(both[0].as_numpy("logits"), both[1].as_numpy("logits"), atol=1e-5)
    print("every call works")


def infer(url, directory):
    x = np.load(directory / "x.npy")
    with triton.InferenceServerClient(url) as client:
        for binary in (True, False):
            np.save(directory / f"logits-{binary}.npy", client.infer(**asked(x, binary)).as_numpy("logits"))


if __name__ == "__main__":
    what, url, *rest = sys.argv[1:]
    if what == "aio":
        asyncio.run(asynchronous(url))
    else:
        {"calls": calls, "infer": infer}[what](url, *map(pathlib.Path, rest))
