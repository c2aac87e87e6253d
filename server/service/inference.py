"""ModelInfer of the Open Inference Protocol (KServe v2) with Triton's extensions, free of any transport."""

from dataclasses import dataclass
from weakref import WeakKeyDictionary

from google.protobuf.message import DecodeError

from layercast.proto.codec import decode_inputs, fill_outputs, is_typed
from layercast.proto.messages import ModelInferRequest, ModelInferResponse
from layercast.server.errors import ResourceExhausted
from layercast.server.model import ServedModel
from layercast.server.monitor import Kind
from layercast.server.service import scopes
from layercast.server.service.answering import LARGE, Answered, Answering, Timer, decoding, off_loop, tell_times, timed
from layercast.server.service.call import Call
from layercast.server.service.classification import Classes, classified, resolve_classes
from layercast.server.service.parameters import asks_raw, check_parameters
from layercast.server.service.plain import Plain
from layercast.server.service.requests import Wanted, check_inputs, resolve_outputs, warnings
from layercast.server.service.short import Short, Told
from layercast.server.work import Array, Terms


@dataclass(slots=True)
class _Asked:
    """A request, decoded and checked."""

    inputs: dict[str, Array]
    rows: int
    wanted: Wanted
    classes: Classes
    typed: bool
    warning: str


class InferenceService:
    """Answers ModelInfer, for every transport and for each request inside a stream."""

    def __init__(self, answering: Answering) -> None:
        self._answering = answering
        self._plain: WeakKeyDictionary[ServedModel, Plain] = WeakKeyDictionary()

    async def model_infer(self, request: ModelInferRequest, call: Call) -> ModelInferResponse:
        """Predictions, and any layer asked for as an output `layer:PATH[@reducer]`.

        A typed request is answered typed, unless it asks for raw outputs or one of them is FP16 or BF16, which have
        no typed form: then all are raw. Outputs come in the order asked.
        """
        response = ModelInferResponse()
        await self.infer_into(response, request, call)
        return response

    def begin_model_infer(self, raw: bytes, deadline: float | None, peer: str, call: Told) -> Short | None:
        """Begin to answer a serialised request if it is plain and right in every way; else do nothing, return None."""
        if len(raw) >= LARGE or not scopes.has(scopes.PREDICT):
            return None
        try:
            request = ModelInferRequest.FromString(raw)
        except DecodeError:
            return None
        model = self._answering.ready_model(request.model_name, request.model_version)
        if model is None:
            return None
        plain = self._plain_of(model)
        found = plain.inputs(request)
        if found is None or found[1] > model.loaded.settings.max_batch:
            return None
        short = Short(model, plain, request, call)
        short.queue(model, *found, Terms(deadline, peer=peer))
        return short

    async def infer_into(self, response: ModelInferResponse, request: ModelInferRequest, call: Call) -> None:
        """Answer `request` in the empty message `response`: one inside another message needs no copy this way."""
        outputs = request.outputs
        asks_layers = bool(outputs) and any(output.name.startswith("layer:") for output in outputs)
        kind: Kind = "features" if asks_layers else "predict"
        model = self._answering.find(request.model_name, request.model_version, kind)
        with self._answering.counted(model, kind) as timer:
            model.batcher.check_room(_claimed_rows(request), call.peer)
            plain = self._plain_of(model)
            # What is large is decoded and encoded in another thread, by the general path.
            if call.size < LARGE and (found := plain.inputs(request)):
                await self._answer_plain(response, request, model, plain, found, call, timer)
                return
            asked = await off_loop(call.size, self._decode, model, request)
            timer.decoded()
            answered = await self._answering.run(
                model, asked.inputs, asked.rows, asked.wanted, call, request.parameters
            )
            timer.ran(answered)
            size = sum(values.nbytes for _, _, values in answered.tensors)
            await off_loop(size, self._encode, response, request, model, asked, answered)

    def _plain_of(self, model: ServedModel) -> Plain:
        plain = self._plain.get(model)
        if plain is None:
            plain = self._plain[model] = Plain(model.manifest, self._answering.max_bytes, LARGE)
        return plain

    async def _answer_plain(
        self,
        response: ModelInferResponse,
        request: ModelInferRequest,
        model: ServedModel,
        plain: Plain,
        found: tuple[dict[str, Array], int],
        call: Call,
        timer: Timer,
    ) -> None:
        scopes.require(scopes.PREDICT, to="asking for outputs")
        timer.decoded()
        answers = await model.run(*found, (), True, Terms(call.deadline, peer=call.peer))
        answered = timed([], answers)
        timer.ran(answered)
        plain.fill(response, request, answers, answered)

    def _decode(self, model: ServedModel, request: ModelInferRequest) -> _Asked:
        manifest = model.manifest
        check_parameters(request)
        with decoding():
            inputs = decode_inputs(request)
        rows = check_inputs(manifest, inputs, {tensor.name: tensor.datatype for tensor in request.inputs})
        return _Asked(
            inputs,
            rows,
            resolve_outputs(manifest, [output.name for output in request.outputs], model.loaded.settings),
            resolve_classes(manifest, request.outputs, rows, self._answering.max_bytes),
            is_typed(request) and not asks_raw(request),
            warnings(manifest, inputs),
        )

    def _encode(
        self,
        response: ModelInferResponse,
        request: ModelInferRequest,
        model: ServedModel,
        asked: _Asked,
        answered: Answered,
    ) -> None:
        _fill(response, request, model, asked, answered)
        # Texts, and typed numbers, have no size that is known before; everything else was checked before it ran.
        if asked.typed or any(output.datatype == "BYTES" for output in response.outputs):
            size, limit = response.ByteSize(), self._answering.max_bytes
            if size > limit:
                raise ResourceExhausted(
                    f"the answer takes {size:,} bytes, a message holds {limit:,}; "
                    "send fewer rows, or raw bytes in place of typed contents"
                )


def _fill(
    response: ModelInferResponse, request: ModelInferRequest, model: ServedModel, asked: _Asked, answered: Answered
) -> None:
    fill_outputs(response, classified(answered.tensors, asked.classes), asked.typed)
    response.model_name, response.model_version = model.manifest.name, str(model.manifest.version)
    response.id = request.id
    tell_times(response, answered)
    if asked.warning:
        response.parameters["warning"].string_param = asked.warning


def _claimed_rows(request: ModelInferRequest) -> int:
    """Return how many rows the request says it has, before anything of it is checked; 0 when it does not say."""
    shape = request.inputs[0].shape if request.inputs else ()
    return shape[0] if shape else 0
