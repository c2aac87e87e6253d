"""Runs where grpc_requests is installed, which knows a server only by its reflection: `URL`."""

import sys

from grpc_requests import Client

client = Client.get_by_endpoint(sys.argv[1])
assert {
    "grpc.health.v1.Health",
    "grpc.reflection.v1alpha.ServerReflection",
    "inference.GRPCInferenceService",
    "layercast.v1.FeatureService",
} == set(client.service_names), client.service_names
inference = client.service("inference.GRPCInferenceService")
assert inference.ServerMetadata({})["name"] == "layercast"
assert inference.ModelMetadata({"name": "mnist"})["inputs"][0]["shape"] == ["-1", "1", "28", "28"]
picture = {"name": "image", "datatype": "FP32", "shape": [1, 1, 28, 28], "contents": {"fp32_contents": [0.5] * 784}}
answer = inference.ModelInfer({"model_name": "mnist", "id": "7", "inputs": [picture]})
assert answer["id"] == "7"
# It sent typed contents, so the answer is typed too.
assert len(answer["outputs"][0]["contents"]["fp32_contents"]) == 10
streamed = list(inference.ModelStreamInfer([{"model_name": "mnist", "inputs": [picture]}, {"model_name": "nothing"}]))
assert streamed[0]["infer_response"]["outputs"] == answer["outputs"], streamed
assert "unknown model" in streamed[1]["error_message"]
found = client.request("layercast.v1.FeatureService", "ListLayers", {"model_name": "mnist", "pattern": "net.0"})
assert [layer["path"] for layer in found["layers"]] == ["net.0"]
assert client.request("grpc.health.v1.Health", "Check", {"service": "model/mnist"})["status"] == "SERVING"
print("reflection works")
