"""The RPCs as data: what a client calls and a server registers, without generated service classes."""

from dataclasses import dataclass
from typing import Literal

from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from layercast.proto.messages import POOL

__all__ = ["FEATURES", "FEATURES_SERVICE", "INFERENCE", "INFERENCE_SERVICE", "POOL", "Method"]

INFERENCE_SERVICE = "inference.GRPCInferenceService"
FEATURES_SERVICE = "layercast.v1.FeatureService"


@dataclass(frozen=True, slots=True)
class Method:
    """One RPC. `path` is what goes on the wire: `/inference.GRPCInferenceService/ModelInfer`."""

    name: str
    path: str
    request: type[Message]
    response: type[Message]
    client_streaming: bool
    server_streaming: bool

    @property
    def kind(self) -> Literal["unary", "server_stream", "bidi_stream"]:
        """How many messages go each way; no RPC of ours takes several and answers with one."""
        if self.client_streaming:
            return "bidi_stream"
        return "server_stream" if self.server_streaming else "unary"


def _method(descriptor: MethodDescriptor) -> Method:
    return Method(
        name=descriptor.name,
        path=f"/{descriptor.containing_service.full_name}/{descriptor.name}",
        request=GetMessageClass(descriptor.input_type),
        response=GetMessageClass(descriptor.output_type),
        client_streaming=descriptor.client_streaming,
        server_streaming=descriptor.server_streaming,
    )


def _methods(service: str) -> dict[str, Method]:
    return {method.name: _method(method) for method in POOL.FindServiceByName(service).methods}


INFERENCE: dict[str, Method] = _methods(INFERENCE_SERVICE)
FEATURES: dict[str, Method] = _methods(FEATURES_SERVICE)
