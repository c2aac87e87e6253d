"""One function a decoder: bytes in, nothing out, and no exception but the decoder's own."""

from collections.abc import Callable

import numpy as np
from google.protobuf.message import DecodeError

from layercast.proto.codec import CodecError, decode_inputs, decode_named, is_typed
from layercast.proto.messages import ExtractRequest, InferTensorContents, ModelInferRequest


def infer(data: bytes) -> None:
    """The message of ModelInfer. What decodes must be as large as its shape says."""
    try:
        request = ModelInferRequest.FromString(data)
    except DecodeError:
        return
    is_typed(request)
    try:
        decoded = decode_inputs(request)
    except CodecError as error:
        _short(error)
        return
    for tensor in request.inputs:
        assert list(decoded[tensor.name].shape) == list(tensor.shape)


def extract(data: bytes) -> None:
    """The message of Extract."""
    try:
        request = ExtractRequest.FromString(data)
    except DecodeError:
        return
    try:
        decode_named(request.inputs)
    except CodecError as error:
        _short(error)


def _short(error: CodecError) -> None:
    assert len(str(error)) < 2000, "an error as long as the request"


TARGETS: dict[str, Callable[[bytes], None]] = {"infer": infer, "extract": extract}


def seeds() -> dict[str, list[bytes]]:
    """Return good messages of every kind for each target."""
    raw = ModelInferRequest(model_name="m", id="1", raw_input_contents=[np.zeros((2, 3), "f4").tobytes()])
    raw.inputs.add(name="x", datatype="FP32", shape=[2, 3])
    texts = ModelInferRequest(model_name="m", raw_input_contents=[b"\x01\x00\x00\x00a\x00\x00\x00\x00"])
    texts.inputs.add(name="x", datatype="BYTES", shape=[2])
    typed = ModelInferRequest(model_name="m")
    typed.inputs.add(name="x", datatype="INT64", shape=[2], contents=InferTensorContents(int64_contents=[1, 2]))
    extract = ExtractRequest(model_name="m", layers=["*@mean"])
    extract.inputs.add(name="x", datatype="BF16", shape=[1, 2], data=b"\x80\x3f\x00\xbf")
    return {
        "infer": [message.SerializeToString() for message in (raw, texts, typed)],
        "extract": [extract.SerializeToString()],
    }
