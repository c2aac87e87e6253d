"""Numbers and types on the wire, against tables written by hand from the protocol's documents."""

import subprocess
from pathlib import Path

import pytest
from google.protobuf import descriptor_pool
from google.protobuf.descriptor import FieldDescriptor

from layercast.proto import messages
from layercast.proto.rpc import FEATURES, INFERENCE, POOL

PROTO3_NAMES = {
    FieldDescriptor.TYPE_BOOL: "bool",
    FieldDescriptor.TYPE_INT32: "int32",
    FieldDescriptor.TYPE_INT64: "int64",
    FieldDescriptor.TYPE_UINT32: "uint32",
    FieldDescriptor.TYPE_UINT64: "uint64",
    FieldDescriptor.TYPE_FLOAT: "float",
    FieldDescriptor.TYPE_DOUBLE: "double",
    FieldDescriptor.TYPE_STRING: "string",
    FieldDescriptor.TYPE_BYTES: "bytes",
}

# One line a message: name=number:type, "*" for repeated, <key,value> for maps.
FIELDS = {
    "inference.ServerReadyResponse": "ready=1:bool",
    "inference.ServerMetadataResponse": "name=1:string version=2:string extensions=3:string*",
    "inference.ModelMetadataResponse": "name=1:string versions=2:string* platform=3:string inputs=4:TensorMetadata*"
    " outputs=5:TensorMetadata* properties=6:<string,string>",
    "inference.ModelMetadataResponse.TensorMetadata": "name=1:string datatype=2:string shape=3:int64*",
    "inference.InferParameter": "bool_param=1:bool int64_param=2:int64 string_param=3:string double_param=4:double"
    " uint64_param=5:uint64",
    "inference.InferTensorContents": "bool_contents=1:bool* int_contents=2:int32* int64_contents=3:int64*"
    " uint_contents=4:uint32* uint64_contents=5:uint64* fp32_contents=6:float* fp64_contents=7:double*"
    " bytes_contents=8:bytes*",
    "inference.ModelInferRequest": "model_name=1:string model_version=2:string id=3:string"
    " parameters=4:<string,InferParameter> inputs=5:InferInputTensor* outputs=6:InferRequestedOutputTensor*"
    " raw_input_contents=7:bytes*",
    "inference.ModelInferRequest.InferInputTensor": "name=1:string datatype=2:string shape=3:int64*"
    " parameters=4:<string,InferParameter> contents=5:InferTensorContents",
    "inference.ModelInferRequest.InferRequestedOutputTensor": "name=1:string parameters=2:<string,InferParameter>",
    "inference.ModelInferResponse": "model_name=1:string model_version=2:string id=3:string"
    " parameters=4:<string,InferParameter> outputs=5:InferOutputTensor* raw_output_contents=6:bytes*",
    "inference.ModelInferResponse.InferOutputTensor": "name=1:string datatype=2:string shape=3:int64*"
    " parameters=4:<string,InferParameter> contents=5:InferTensorContents",
    "inference.ModelStreamInferResponse": "error_message=1:string infer_response=2:ModelInferResponse",
    "inference.ModelStatistics": "name=1:string version=2:string last_inference=3:uint64 inference_count=4:uint64"
    " execution_count=5:uint64 inference_stats=6:InferStatistics batch_stats=7:InferBatchStatistics*"
    " memory_usage=8:MemoryUsage* response_stats=9:<string,InferResponseStatistics>",
    "inference.InferStatistics": "success=1:StatisticDuration fail=2:StatisticDuration queue=3:StatisticDuration"
    " compute_input=4:StatisticDuration compute_infer=5:StatisticDuration compute_output=6:StatisticDuration"
    " cache_hit=7:StatisticDuration cache_miss=8:StatisticDuration",
    "inference.InferBatchStatistics": "batch_size=1:uint64 compute_input=2:StatisticDuration"
    " compute_infer=3:StatisticDuration compute_output=4:StatisticDuration",
    "inference.MemoryUsage": "type=1:string id=2:int64 byte_size=3:uint64",
    "inference.ModelRepositoryParameter": "bool_param=1:bool int64_param=2:int64 string_param=3:string"
    " bytes_param=4:bytes",
    "inference.RepositoryIndexRequest": "repository_name=1:string ready=2:bool",
    "inference.RepositoryIndexResponse.ModelIndex": "name=1:string version=2:string state=3:string reason=4:string",
    "inference.RepositoryModelLoadRequest": "repository_name=1:string model_name=2:string"
    " parameters=3:<string,ModelRepositoryParameter>",
    "inference.SystemSharedMemoryRegisterRequest": "name=1:string key=2:string offset=3:uint64 byte_size=4:uint64",
    "inference.CudaSharedMemoryRegisterRequest": "name=1:string raw_handle=2:bytes device_id=3:int64"
    " byte_size=4:uint64",
    "inference.TraceSettingRequest": "settings=1:<string,SettingValue> model_name=2:string",
    "inference.LogSettingsRequest.SettingValue": "bool_param=1:bool uint32_param=2:uint32 string_param=3:string",
    "inference.ModelConfig": "name=1:string platform=2:string version_policy=3:ModelVersionPolicy"
    " max_batch_size=4:int32"
    " input=5:ModelInput* output=6:ModelOutput* instance_group=7:ModelInstanceGroup* default_model_filename=8:string"
    " cc_model_filenames=9:<string,string> metric_tags=10:<string,string> dynamic_batching=11:ModelDynamicBatching"
    " optimization=12:ModelOptimizationPolicy sequence_batching=13:ModelSequenceBatching"
    " parameters=14:<string,ModelParameter> ensemble_scheduling=15:ModelEnsembling model_warmup=16:ModelWarmup*"
    " backend=17:string model_operations=18:ModelOperations model_transaction_policy=19:ModelTransactionPolicy"
    " batch_input=20:BatchInput* batch_output=21:BatchOutput* model_repository_agents=23:ModelRepositoryAgents"
    " response_cache=24:ModelResponseCache runtime=25:string model_metrics=26:ModelMetrics",
    "inference.ModelInput": "name=1:string data_type=2:DataType format=3:Format dims=4:int64*"
    " reshape=5:ModelTensorReshape"
    " is_shape_tensor=6:bool allow_ragged_batch=7:bool optional=8:bool is_non_linear_format_io=9:bool",
    "inference.ModelOutput": "name=1:string data_type=2:DataType dims=3:int64* label_filename=4:string"
    " reshape=5:ModelTensorReshape is_shape_tensor=6:bool is_non_linear_format_io=7:bool",
    "inference.ModelInstanceGroup": "name=1:string count=2:int32 gpus=3:int32* kind=4:Kind profile=5:string*"
    " rate_limiter=6:ModelRateLimiter passive=7:bool secondary_devices=8:SecondaryDevice* host_policy=9:string",
    "inference.ModelDynamicBatching": "preferred_batch_size=1:int32* max_queue_delay_microseconds=2:uint64"
    " preserve_ordering=3:bool priority_levels=4:uint64 default_priority_level=5:uint64"
    " default_queue_policy=6:ModelQueuePolicy priority_queue_policy=7:<uint64,ModelQueuePolicy>",
    "inference.ModelQueuePolicy": "timeout_action=1:TimeoutAction default_timeout_microseconds=2:uint64"
    " allow_timeout_override=3:bool max_queue_size=4:uint32",
    "layercast.v1.Layer": "path=1:string type=2:string datatype=3:string shape=4:int64* order=5:int32"
    " parameters=6:int64 available=7:bool reason=8:string",
    "layercast.v1.NamedTensor": "name=1:string datatype=2:string shape=3:int64* data=4:bytes",
    "layercast.v1.ExtractRequest": "model_name=1:string model_version=2:string id=3:string inputs=4:NamedTensor*"
    " layers=5:string* outputs=6:string*",
    "layercast.v1.ExtractResponse": "model_name=1:string model_version=2:string id=3:string layers=4:NamedTensor*"
    " outputs=5:NamedTensor* timing=6:Timing warning=7:string",
    "layercast.v1.ExtractStreamRequest": "extract=1:ExtractRequest chunk_bytes=2:int64",
    "layercast.v1.ExtractStreamResponse": "model_name=1:string model_version=2:string id=3:string total_rows=4:int64"
    " first_row=5:int64 rows=6:int64 layers=7:TensorPart* outputs=8:TensorPart* timing=9:Timing warning=10:string"
    " partial=11:bool",
    "layercast.v1.TensorPart": "name=1:string datatype=2:string shape=3:int64* offset=4:int64 data=5:bytes",
    "layercast.v1.ExplainRequest": "model_name=1:string model_version=2:string id=3:string inputs=4:NamedTensor*"
    " method=5:string targets=6:int64* options=7:ExplainOptions output=8:string input=9:string",
    "layercast.v1.ExplainOptions": "layer=1:string steps=2:int32 baseline=3:double samples=4:int32 noise=5:double"
    " seed=6:int64 window=7:int32* stride=8:int32* upsample=9:bool pool=10:string residual=11:double",
    "layercast.v1.ExplainResponse": "model_name=1:string model_version=2:string id=3:string"
    " attributions=4:NamedTensor targets=5:int64* delta=6:double* timing=7:Timing warning=8:string",
    "layercast.v1.SteerRequest": "model_name=1:string model_version=2:string id=3:string inputs=4:NamedTensor*"
    " edits=5:Edit* outputs=6:string* layers=7:string*",
    "layercast.v1.Edit": "layer=1:string zero=2:Zero scale=3:double add=4:Vector clamp=5:Bounds mean=6:Mean"
    " units=7:int64* channels=8:int64* heads=9:int64* positions=10:int64*",
    "layercast.v1.SteerResponse": "model_name=1:string model_version=2:string id=3:string outputs=4:NamedTensor*"
    " layers=5:NamedTensor* timing=6:Timing warning=7:string",
    "layercast.v1.Timing": "queue_ns=1:int64 compute_ns=2:int64 batch_rows=3:int64",
}

UNARY = {
    "inference.GRPCInferenceService": "ServerLive ServerReady ModelReady ServerMetadata ModelMetadata ModelInfer"
    " ModelConfig ModelStatistics RepositoryIndex RepositoryModelLoad RepositoryModelUnload SystemSharedMemoryStatus"
    " SystemSharedMemoryRegister SystemSharedMemoryUnregister CudaSharedMemoryStatus CudaSharedMemoryRegister"
    " CudaSharedMemoryUnregister TraceSetting LogSettings",
    "layercast.v1.FeatureService": "ListLayers Extract Explain Steer",
}


def type_of(field: FieldDescriptor) -> str:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        key, value = field.message_type.fields
        return f"<{type_of(key)},{type_of(value)}>"
    named = field.message_type or field.enum_type
    name = named.name if named is not None else PROTO3_NAMES[field.type]
    return name + ("*" if field.is_repeated else "")


@pytest.mark.parametrize("message", FIELDS)
def test_fields_have_the_protocol_numbers_and_types(message: str) -> None:
    fields = sorted(POOL.FindMessageTypeByName(message).fields, key=lambda field: field.number)
    assert " ".join(f"{field.name}={field.number}:{type_of(field)}" for field in fields) == FIELDS[message]


def test_every_rpc_is_in_the_table_with_its_messages() -> None:
    for service, methods in (("inference.GRPCInferenceService", INFERENCE), ("layercast.v1.FeatureService", FEATURES)):
        unary = UNARY[service].split()
        assert set(methods) - {"ModelStreamInfer", "ExtractStream"} == set(unary)
        for name in unary:
            method = methods[name]
            assert method.path == f"/{service}/{name}"
            assert (method.client_streaming, method.server_streaming) == (False, False)
            assert method.kind == "unary"
            assert method.request is getattr(messages, f"{name}Request")
            assert method.response is getattr(messages, f"{name}Response")


def test_the_stream_rpc_wraps_responses() -> None:
    stream = INFERENCE["ModelStreamInfer"]
    assert (stream.client_streaming, stream.server_streaming) == (True, True)
    assert (stream.request.DESCRIPTOR.name, stream.response.DESCRIPTOR.name) == (
        "ModelInferRequest",
        "ModelStreamInferResponse",
    )


def test_the_stream_of_layers_wraps_a_request() -> None:
    method = FEATURES["ExtractStream"]
    assert (method.client_streaming, method.server_streaming, method.kind) == (False, True, "server_stream")
    assert method.request.DESCRIPTOR.name == "ExtractStreamRequest"
    assert method.response.DESCRIPTOR.name == "ExtractStreamResponse"


def test_datatype_enum() -> None:
    names = ["INVALID", "BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64"]
    names += ["FP16", "FP32", "FP64", "STRING", "BF16"]
    assert dict(messages.DataType.items()) == {f"TYPE_{name}": number for number, name in enumerate(names)}


def test_request_bytes_match_a_message_encoded_by_hand() -> None:
    request = messages.ModelInferRequest(model_name="m", id="7", raw_input_contents=[b"\x01\x02"])
    request.inputs.add(name="x", datatype="UINT8", shape=[1, 2])
    by_hand = (
        b"\x0a\x01m" + b"\x1a\x017" + b"\x2a\x0e" + b"\x0a\x01x\x12\x05UINT8\x1a\x02\x01\x02" + b"\x3a\x02\x01\x02"
    )
    assert request.SerializeToString(deterministic=True) == by_hand
    assert messages.ModelInferRequest.FromString(by_hand) == request


def test_unknown_fields_are_ignored() -> None:
    assert messages.ServerLiveResponse.FromString(b"\x08\x01" + b"\xfa\x3f\x03abc").live is True


def test_the_default_pool_stays_free() -> None:
    with pytest.raises(KeyError):
        descriptor_pool.Default().FindMessageTypeByName("inference.ModelInferRequest")


@pytest.mark.parametrize(
    "imports", ["layercast.client, tritonclient.grpc", "tritonclient.grpc, layercast.client"], ids=["first", "second"]
)
def test_lives_in_one_process_with_tritonclient(imports: str, tmp_path: Path, stock_python: str) -> None:
    program = f"import {imports}\nfrom layercast.proto.messages import ModelInferRequest as ours\n" + (
        "from tritonclient.grpc.service_pb2 import ModelInferRequest as theirs\n"
        "assert theirs.FromString(ours(model_name='m', id='1').SerializeToString()).model_name == 'm'\n"
    )
    done = subprocess.run([stock_python, "-c", program], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
