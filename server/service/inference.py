"""ModelInfer of the Open Inference Protocol (KServe v2) with Triton's extensions, free of any transport."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from google.protobuf.message import DecodeError

from layercast.proto.codec import decode_inputs, fill_outputs, is_typed
from layercast.proto.messages import ModelInferRequest, ModelInferResponse
from layercast.server.compiled import Mark
from layercast.server.layers import check_answer
from layercast.server.model import ServedModel
from layercast.server.monitor import Kind
from layercast.server.service import scopes
from layercast.server.service.answering import LARGE, Answered, Answering, Timer, decoding, off_loop, tell_times, timed
from layercast.server.service.bunch import Asked, Bunch
from layercast.server.service.call import Call
from layercast.server.service.classification import Classes, classified, resolve_classes
from layercast.server.service.form import Form
from layercast.server.service.gathering import Declinable, Gathered, Gathering
from layercast.server.service.heads import Heads, Known
from layercast.server.service.parameters import asks_raw, check_parameters
from layercast.server.service.plain import Plain
from layercast.server.service.requests import Wanted, check_inputs, join, resolve_outputs, warnings
from layercast.server.service.short import Short, Told
from layercast.server.service.template import id_field, values_of
from layercast.server.work import Array, Terms

logger = logging.getLogger(__name__)


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
        self._heads = Heads(answering.ready_model)
        self._gatherings: WeakKeyDictionary[Mark, Gathering] = WeakKeyDictionary()
        self._plain: WeakKeyDictionary[Mark, Plain] = WeakKeyDictionary()

    async def model_infer(self, request: ModelInferRequest, call: Call) -> ModelInferResponse:
        """Predictions, and any layer asked for as an output `layer:PATH[@reducer]`.

        A typed request is answered typed, unless it asks for raw outputs or one of them is FP16 or BF16, which have
        no typed form: then all are raw. Outputs come in the order asked.
        """
        response = ModelInferResponse()
        await self.infer_into(response, request, call)
        return response

    def begin_model_infer(
        self, raw: bytes, deadline: float | None, peer: str, call: Declinable
    ) -> Short | Gathered | None:
        """Begin to answer a serialised request if it is plain and right in every way; else do nothing, return None.

        One that waits for others is begun, or declined, when they are there.
        """
        if len(raw) >= LARGE or not scopes.has(scopes.PREDICT):
            return None
        known = self._heads.known(raw) or self._parsed(raw)
        if known is None:
            return None
        # Whether a caller may see layers is known where it calls.
        if not known.form.taps and known.model.gathers(known.form.length):
            gathering = self._gathering(known.model)
            if gathering.takes(len(raw), deadline):
                return gathering.take(known, raw, deadline, peer, call)
        return self.begin(known, deadline, peer, call)

    def all_known(self, messages: Sequence[bytes]) -> list[Known | None]:
        """Recognise serialised requests that are plain, and that the caller may make; only values are left to see."""
        if not scopes.has(scopes.PREDICT):
            return [None] * len(messages)
        return [
            found or (self._parsed(raw) if len(raw) < LARGE else None)
            for raw, found in zip(messages, self._heads.all_known(messages), strict=True)
        ]

    def begin(self, known: Known, deadline: float | None, peer: str, call: Told) -> Short | None:
        """Begin to answer a plain request if its values are right; else do nothing and return None."""
        if known.form.taps and not scopes.has(scopes.FEATURES):
            return None
        return self._begin_on(Terms(deadline, peer=peer), known, call)

    def begin_together(self, requests: Sequence[Asked[Any]], deadline: float | None, peer: str) -> Bunch | None:
        """Begin to answer plain requests of one form as one work; None, nothing being done, if that may not be."""
        start, form, model = time.perf_counter_ns(), requests[0].known.form, requests[0].known.model
        many = len(requests)
        if many == 1 or form.taps or not model.takes_together(form.rows * many, sum(form.sizes) * many):
            return None
        inputs = form.together([asked.known.contents for asked in requests])
        if inputs is None:
            return None
        bunch = Bunch(requests, start)
        bunch.queue(inputs, Terms(deadline, peer=peer))
        return bunch

    def _begin_on(self, terms: Terms, known: Known, call: Told) -> Short | None:
        start = time.perf_counter_ns() - terms.waited_ns
        inputs = known.form.inputs(known.contents)
        if inputs is None:
            return None
        short = Short(known, start, call)
        short.queue(inputs, terms)
        return short

    def _gathering(self, model: ServedModel) -> Gathering:
        gathering = self._gatherings.get(model.mark)
        if gathering is None:
            gathering = Gathering(self._begin_gathered, model.loaded.settings.max_batch)
            self._gatherings[model.mark], model.on_hurry = gathering, gathering.end
        return gathering

    def _begin_gathered(self, waiting: Sequence[Gathered]) -> None:
        """Begin to answer requests that have waited for each other; decline those with wrong values."""
        try:
            if _begin_at_once(waiting):
                return
        except Exception:
            logger.exception("requests that had waited for each other could not be begun together")
        for each in waiting:
            if each.known is None:
                continue
            try:
                short = self._begin_on(each.terms, each.known, each.call)
            except Exception:  # the general path says what it is
                short = None
            if short:
                each.begun_as(short)
            else:
                each.decline()

    def _parsed(self, raw: bytes) -> Known | None:
        try:
            request = ModelInferRequest.FromString(raw)
        except DecodeError:
            return None
        model = self._answering.ready_model(request.model_name, request.model_version)
        form = self._plain_of(model).form(request) if model else None
        if model is None or form is None or form.rows > model.loaded.settings.max_batch:
            return None
        self._heads.learn(raw, request, model, form)
        return Known(model, form, id_field(request), request.raw_input_contents)

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
            if (
                call.size < LARGE
                and (form := plain.form(request))
                and (inputs := form.inputs(request.raw_input_contents))
            ):
                await self._answer_plain(response, request, model, form, inputs, call, timer)
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
        plain = self._plain.get(model.mark)
        if plain is None:
            settings = model.loaded.settings
            plain = self._plain[model.mark] = Plain(model.manifest, self._answering.max_bytes, LARGE, settings)
        return plain

    async def _answer_plain(
        self,
        response: ModelInferResponse,
        request: ModelInferRequest,
        model: ServedModel,
        form: Form,
        inputs: dict[str, Array],
        call: Call,
        timer: Timer,
    ) -> None:
        if form.predict:
            scopes.require(scopes.PREDICT, to="asking for outputs")
        if form.taps:
            scopes.require(scopes.FEATURES, to="asking for layers")
        timer.decoded()
        answers = await model.run(inputs, form.rows, form.taps, form.predict, Terms(call.deadline, peer=call.peer))
        answered = timed([], answers)
        timer.ran(answered)
        parts = [values_of(answer) for answer in answers]
        values = {source: join([part[source] for part in parts]) for source in parts[0]}
        if form.taps:
            model.monitor.tapped(len(form.taps), sum(values[tap].nbytes for tap in form.taps))
        times = answered.queue_ns, answered.compute_ns, answered.batch_rows
        response.MergeFromString(form.template.answer(id_field(request), values, *times))

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
            cure = "send fewer rows, or raw bytes in place of typed contents"
            check_answer(response.ByteSize(), self._answering.max_bytes, cure)


def _begin_at_once(waiting: Sequence[Gathered]) -> bool:
    """Answer requests for one model as one work if they have one form and right values, and run at once.

    In the queue each has to be by itself, since each may be withdrawn, or be too late, and belongs to its own peer.
    """
    known, many = [each.known for each in waiting if each.known], len(waiting)
    model, form = known[0].model, known[0].form
    if many == 1 or any(each.form is not form for each in known):
        return False
    rows = form.rows * many
    if not (model.takes_together(rows, sum(form.sizes) * many) and model.batcher.runs_at_once(rows, many, form.length)):
        return False
    inputs = form.together([each.contents for each in known])
    if inputs is None:
        return False
    terms = [each.terms for each in waiting]
    waited_ns = sum(each.waited_ns for each in terms) // many
    asked = [Asked(one, b"", each.call) for one, each in zip(known, waiting, strict=True)]
    bunch = Bunch(asked, time.perf_counter_ns() - waited_ns)
    for each in waiting:
        each.begun_as(bunch)
    bunch.queue(inputs, Terms(waited_ns=waited_ns), terms)
    model.batcher.run_now()
    return True


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
