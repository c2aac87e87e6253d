"""What each call of the clients does, without input and output.

An operation is a generator: it yields the RPC that it wants next, is sent the outcome (a message or an error), and
returns the result. `Client` and `AsyncClient` differ only in how they carry the RPCs out.
"""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from google.protobuf.message import Message

from layercast.client.edits import Edit
from layercast.client.errors import InvalidArgument, LayercastError, NotFound, Unavailable
from layercast.client.explaining import Targets, explanation_of, options_message, target_indices
from layercast.client.question import Outputs, Question
from layercast.client.translation import Inputs, decoding, metadata_of, pass_on, sent_inputs, taps
from layercast.client.types import Explanation, LayerInfo, ModelInfo, ModelMetadata
from layercast.proto.codec import AnyArray, decode_named
from layercast.proto.messages import (
    ExplainRequest,
    ExplainResponse,
    ExtractRequest,
    ExtractResponse,
    ExtractStreamRequest,
    ListLayersRequest,
    ListLayersResponse,
    ModelMetadataRequest,
    ModelMetadataResponse,
    ModelReadyRequest,
    ModelReadyResponse,
    RepositoryIndexRequest,
    RepositoryIndexResponse,
    ServerLiveRequest,
    ServerLiveResponse,
    ServerReadyRequest,
    ServerReadyResponse,
    SteerRequest,
    SteerResponse,
)
from layercast.proto.rpc import FEATURES, INFERENCE, Method

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Call:
    """One RPC to carry out."""

    method: Method
    request: Message


# Sent back for each Call: the response, or the error that stands for it.
Outcome = Message | LayercastError
Steps = Generator[Call, Outcome, Result]


class Operations:
    """The operations of one client. Remembers each model's metadata, which is asked for once."""

    def __init__(self) -> None:
        self._metadata: dict[tuple[str, str], ModelMetadata] = {}

    def predict(
        self, model: str, inputs: Inputs, version: str, outputs: Outputs, identifier: str
    ) -> Steps[AnyArray | dict[str, AnyArray]]:
        """See `Client.predict`."""
        question = yield from self.question(model, version, outputs)
        call = Call(INFERENCE["ModelInfer"], question.request(inputs, identifier))
        return question.result((yield from self._with_model(call, question.metadata)))

    def question(self, model: str, version: str, outputs: Outputs) -> Steps[Question]:
        """What is asked of a model, for one input after the other."""
        return Question(model, version, outputs, (yield from self._known(model, version)))

    def features(
        self,
        model: str,
        inputs: Inputs,
        layers: str | Sequence[str],
        reduce: str | None,
        outputs: str | Sequence[str] | None,
        version: str,
        identifier: str,
    ) -> Steps[dict[str, AnyArray]]:
        """See `Client.features`."""
        metadata = yield from self._known(model, version)
        request = _extraction(metadata, model, inputs, layers, reduce, outputs, version, identifier)
        response: ExtractResponse = yield from self._with_model(Call(FEATURES["Extract"], request), metadata)
        pass_on(response.warning)
        with decoding(model):
            return decode_named([*response.layers, *response.outputs], kind="output", limit=None)

    def stream_features(
        self,
        model: str,
        inputs: Inputs,
        layers: str | Sequence[str],
        reduce: str | None,
        outputs: str | Sequence[str] | None,
        version: str,
        chunk_bytes: int,
        identifier: str,
    ) -> Steps[tuple[Call, ModelMetadata]]:
        """The RPC whose answers are read by `Client.stream_features`, and what is to be forgotten when it fails."""
        metadata = yield from self._known(model, version)
        request = _extraction(metadata, model, inputs, layers, reduce, outputs, version, identifier)
        asked = ExtractStreamRequest(extract=request, chunk_bytes=chunk_bytes)
        return Call(FEATURES["ExtractStream"], asked), metadata

    def steer(
        self,
        model: str,
        inputs: Inputs,
        edits: Edit | Sequence[Edit],
        outputs: str | Sequence[str] | None,
        layers: str | Sequence[str],
        reduce: str | None,
        version: str,
        identifier: str,
    ) -> Steps[dict[str, AnyArray]]:
        """See `Client.steer`."""
        metadata = yield from self._known(model, version)
        request = SteerRequest(
            model_name=model,
            model_version=version,
            id=identifier,
            edits=[edit.message for edit in ([edits] if isinstance(edits, Edit) else edits)],
            outputs=[outputs] if isinstance(outputs, str) else outputs,
            layers=taps(layers, reduce),
            inputs=sent_inputs(metadata, inputs),
        )
        response: SteerResponse = yield from self._with_model(Call(FEATURES["Steer"], request), metadata)
        pass_on(response.warning)
        with decoding(model):
            return decode_named([*response.outputs, *response.layers], kind="output", limit=None)

    def explain(
        self,
        model: str,
        inputs: Inputs,
        method: str,
        targets: Targets,
        named: tuple[str | None, str | None],
        version: str,
        identifier: str,
        options: Mapping[str, Any],
    ) -> Steps[Explanation]:
        """See `Client.explain`; `named` are the output and the input that are explained."""
        asked = options_message(options)
        metadata = yield from self._known(model, version)
        output, of = named
        request = ExplainRequest(
            model_name=model,
            model_version=version,
            id=identifier,
            method=method,
            targets=target_indices(targets),
            options=asked,
            output=output or "",
            input=of or "",
            inputs=sent_inputs(metadata, inputs),
        )
        response: ExplainResponse = yield from self._with_model(Call(FEATURES["Explain"], request), metadata)
        with decoding(model):
            return explanation_of(response)

    def layers(self, model: str, pattern: str, version: str) -> Steps[list[LayerInfo]]:
        """See `Client.layers`."""
        request = ListLayersRequest(model_name=model, model_version=version, pattern=pattern)
        response: ListLayersResponse = yield from _ask(Call(FEATURES["ListLayers"], request))
        return [
            LayerInfo(
                path=layer.path,
                type=layer.type,
                datatype=layer.datatype,
                shape=tuple(layer.shape),
                order=layer.order,
                parameters=layer.parameters,
                available=layer.available,
                reason=layer.reason,
            )
            for layer in response.layers
        ]

    def models(self) -> Steps[list[ModelInfo]]:
        """See `Client.models`."""
        call = Call(INFERENCE["RepositoryIndex"], RepositoryIndexRequest())
        response: RepositoryIndexResponse = yield from _ask(call)
        return [ModelInfo(index.name, index.version, index.state, index.reason) for index in response.models]

    def metadata(self, model: str, version: str) -> Steps[ModelMetadata]:
        """See `Client.metadata`. Always asks, and refreshes what `predict` knows."""
        call = Call(INFERENCE["ModelMetadata"], ModelMetadataRequest(name=model, version=version))
        response: ModelMetadataResponse = yield from _ask(call)
        metadata = self._metadata[model, version] = metadata_of(response)
        return metadata

    def is_live(self) -> Steps[bool]:
        """See `Client.is_live`."""
        response: ServerLiveResponse | None = yield from _ask_if_up(Call(INFERENCE["ServerLive"], ServerLiveRequest()))
        return response is not None and response.live

    def is_ready(self) -> Steps[bool]:
        """See `Client.is_ready`."""
        call = Call(INFERENCE["ServerReady"], ServerReadyRequest())
        response: ServerReadyResponse | None = yield from _ask_if_up(call)
        return response is not None and response.ready

    def is_model_ready(self, model: str, version: str) -> Steps[bool]:
        """See `Client.is_model_ready`."""
        call = Call(INFERENCE["ModelReady"], ModelReadyRequest(name=model, version=version))
        response: ModelReadyResponse | None = yield from _ask_if_up(call)
        return response is not None and response.ready

    def _known(self, model: str, version: str) -> Steps[ModelMetadata]:
        if (model, version) in self._metadata:
            return self._metadata[model, version]
        return (yield from self.metadata(model, version))

    def _with_model(self, call: Call, metadata: ModelMetadata) -> Steps[Any]:
        """Ask; when the server refuses, forget the metadata, since a new version may have other inputs."""
        try:
            return (yield from _ask(call))
        except (InvalidArgument, NotFound):
            self.forget(metadata)
            raise

    def forget(self, metadata: ModelMetadata) -> None:
        """Ask for this model's metadata again next time."""
        self._metadata = {key: known for key, known in self._metadata.items() if known is not metadata}


def _extraction(
    metadata: ModelMetadata,
    model: str,
    inputs: Inputs,
    layers: str | Sequence[str],
    reduce: str | None,
    outputs: str | Sequence[str] | None,
    version: str,
    identifier: str,
) -> ExtractRequest:
    return ExtractRequest(
        model_name=model,
        model_version=version,
        id=identifier,
        layers=taps(layers, reduce),
        outputs=[outputs] if isinstance(outputs, str) else outputs,
        inputs=sent_inputs(metadata, inputs),
    )


def _ask(call: Call) -> Steps[Any]:
    outcome = yield call
    if isinstance(outcome, LayercastError):
        raise outcome
    return outcome


def _ask_if_up(call: Call) -> Steps[Any]:
    """None when there is no server to ask."""
    try:
        return (yield from _ask(call))
    except Unavailable:
        return None
