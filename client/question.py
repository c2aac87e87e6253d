"""What a prediction asks of a model, and what an answer to it means."""

from dataclasses import dataclass

from layercast.client.translation import Inputs, decoding, encoding, named_inputs, only, pass_on
from layercast.client.types import ModelMetadata
from layercast.proto.codec import AnyArray, decode_outputs, fill_inputs
from layercast.proto.messages import ModelInferRequest, ModelInferResponse

Outputs = str | list[str] | tuple[str, ...] | None


@dataclass(frozen=True, slots=True)
class Question:
    """A prediction of a model, asked of one input after the other: requests, and what their answers mean."""

    model: str
    version: str
    outputs: Outputs
    metadata: ModelMetadata

    def request(self, inputs: Inputs, identifier: str) -> ModelInferRequest:
        """The message that asks for these inputs."""
        request = ModelInferRequest(model_name=self.model, model_version=self.version, id=identifier)
        for name in [self.outputs] if isinstance(self.outputs, str) else self.outputs or ():
            request.outputs.add(name=name)
        with encoding():
            fill_inputs(request, named_inputs(self.metadata, inputs))
        return request

    def result(self, response: ModelInferResponse) -> AnyArray | dict[str, AnyArray]:
        """What `predict` returns for an answer."""
        with decoding(self.model):
            arrays = decode_outputs(response)
        if "warning" in response.parameters:
            pass_on(response.parameters["warning"].string_param)
        if isinstance(self.outputs, str):
            return only(arrays, self.outputs)
        if self.outputs is None and len(self.metadata.outputs) == 1 and len(arrays) == 1:
            return next(iter(arrays.values()))
        return arrays
