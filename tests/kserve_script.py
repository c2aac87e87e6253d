"""Runs where KServe's own client is installed: `GRPC_URL HTTP_URL FOLDER`. Writes what it was answered to FOLDER."""

import asyncio
import logging
import pathlib
import sys

import grpc
import httpx
import numpy as np
from kserve import InferenceGRPCClient, InferenceRESTClient, InferInput, InferRequest, RESTConfig
from kserve.protocol.infer_type import RequestedOutput

PICTURES = np.random.default_rng(0).random((3, 1, 28, 28), dtype="f4")
logging.disable()  # it logs each error before it raises it


def asked(model, parameters=None, outputs=None):
    tensor = InferInput("image", list(PICTURES.shape), "FP32")
    tensor.set_data_from_numpy(PICTURES, binary_data=True)
    return InferRequest(model, [tensor], request_id="7", parameters=parameters, request_outputs=outputs)


async def refusal(call, kind):
    try:
        await call
    except kind as error:
        return error
    raise AssertionError("an unknown model answered")


async def over_grpc(url, folder):
    async with InferenceGRPCClient(url) as client:
        assert await client.is_server_live()
        assert await client.is_server_ready()
        assert await client.is_model_ready("mnist")
        assert not await client.is_model_ready("nothing")
        answer = await client.infer(asked("mnist"))
        assert (answer.id, answer.model_name, answer.model_version) == ("7", "mnist", "1"), answer
        np.save(folder / "grpc.npy", answer.outputs[0].as_numpy())
        layer = await client.infer(asked("mnist", outputs=[RequestedOutput("layer:net.0@mean")]))
        assert layer.outputs[0].name == "layer:net.0@mean"
        np.save(folder / "layer.npy", layer.outputs[0].as_numpy())
        error = await refusal(client.infer(asked("nothing")), grpc.RpcError)
        assert error.code() == grpc.StatusCode.NOT_FOUND, error


async def over_rest(url, folder):
    client = InferenceRESTClient(RESTConfig(protocol="v2"))
    assert await client.is_server_live(url)
    assert await client.is_server_ready(url)
    assert await client.is_model_ready(url, "mnist")
    for name, binary in (("binary", True), ("json", False)):
        answer = await client.infer(url, asked("mnist", parameters={"binary_data_output": binary}), model_name="mnist")
        assert (answer.id, answer.model_name) == ("7", "mnist"), answer
        np.save(folder / f"{name}.npy", answer.outputs[0].as_numpy())
    error = await refusal(client.infer(url, asked("nothing"), model_name="nothing"), httpx.HTTPStatusError)
    assert error.response.status_code == 404, error
    assert "nothing" in str(error), error
    await client.close()


grpc_url, http_url, where = sys.argv[1], sys.argv[2], pathlib.Path(sys.argv[3])
asyncio.run(over_grpc(grpc_url, where))
asyncio.run(over_rest(http_url, where))
print("KServe's client works")
