"""What both services share: find the model, run the rows, count the request, whatever its end."""

import asyncio
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Final, ParamSpec, TypeVar

import numpy as np

from layercast.models.edits import Planned
from layercast.models.manifest import LayerSpec, Manifest, TensorSpec
from layercast.models.reducers import reduced_shape
from layercast.proto.codec import CodecError, Tensor, decode_named
from layercast.proto.messages import InferParameter, ModelInferResponse, NamedTensor, Timing
from layercast.proto.tensors import memory_dtype
from layercast.server.errors import DeadlineCancelled, InvalidArgument, ServingError
from layercast.server.layers import check_feature_bytes, check_size, reduced_datatype
from layercast.server.metrics import UNKNOWN, Metrics
from layercast.server.model import ServedModel
from layercast.server.monitor import Kind
from layercast.server.repository import Repository
from layercast.server.service import scopes
from layercast.server.service.call import Call
from layercast.server.service.requests import Wanted, check_inputs, join, token_length
from layercast.server.service.terms import NO_PARAMETERS, terms_of
from layercast.server.work import Answer, Array, Tap, Terms

P = ParamSpec("P")
T = TypeVar("T")

# Bytes; a typed message of this size takes several milliseconds to go through, a hand-over to a thread 0.1.
LARGE: Final = 256 << 10


@dataclass(slots=True)
class Answered:
    """A request's values by name, in the order asked, with datatypes, and where the time went."""

    tensors: list[Tensor]
    queue_ns: int
    compute_ns: int
    batch_rows: int


class Timer:
    """The stages of one request, in nanoseconds since it came."""

    def __init__(self) -> None:
        self.start = time.perf_counter_ns()
        self._decoded = self.start
        self._ran = self.start
        self._answered: Answered | None = None

    def decoded(self) -> None:
        """The request is checked and its rows are about to be queued."""
        self._decoded = time.perf_counter_ns()

    def ran(self, answered: Answered) -> None:
        """The answer came back from the batcher."""
        self._ran, self._answered = time.perf_counter_ns(), answered

    def spent(self) -> tuple[int, int, int, int, int]:
        """Where the time went, the request being answered now: in all, decoding, in the queue, computing, encoding."""
        now, answered = time.perf_counter_ns(), self._answered
        queue, compute = (answered.queue_ns, answered.compute_ns) if answered else (0, 0)
        return now - self.start, self._decoded - self.start, queue, compute, now - self._ran


class Counting:
    """Counts the request that its body answers, by its end, and keeps the model until then. Gives the request's Timer.

    A class, since a generator that is made a context manager costs every request three times as much.
    """

    __slots__ = ("_kind", "_late", "_model", "_timer")

    def __init__(self, model: ServedModel, kind: Kind, late: float = math.inf) -> None:
        self._model = model
        self._kind = kind
        self._late = late
        self._timer = Timer()

    def __enter__(self) -> Timer:
        begin(self._model)
        return self._timer

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            succeeded(self._model, self._kind, *self._timer.spent())
        else:
            failed(self._model, self._kind, error, self._timer.start, self._late)


def begin(model: ServedModel, many: int = 1) -> None:
    """Keep the model for a request, of which `succeeded` or `failed` must tell the end, or for so many."""
    model.hold(many)
    model.monitor.inflight.add(many)


def succeeded(
    model: ServedModel, kind: Kind, total: int, decode: int, queue: int, compute: int, encode: int, many: int = 1
) -> None:
    """Count a request that was answered, and where its nanoseconds went; or so many that took the same."""
    model.let_go(many)
    model.monitor.inflight.add(-many)
    model.monitor.succeeded(kind, total, decode, queue, compute, encode, many)


def failed(model: ServedModel, kind: Kind, error: BaseException, start: int, late: float = math.inf) -> None:
    """Count a request that came at `start` and ended with `error`; see `Answering.counted` about `late`."""
    model.let_go()
    model.monitor.inflight.add(-1)
    if code := _code(error, late):
        model.monitor.failed(kind, code, time.perf_counter_ns() - start)


def _code(error: BaseException, late: float) -> str:
    """Return the status that a request with this end is counted under, "" for what ends the whole process."""
    if isinstance(error, ServingError):
        return error.code.name
    if isinstance(error, asyncio.CancelledError | GeneratorExit):
        over = isinstance(error, DeadlineCancelled) or asyncio.get_running_loop().time() >= late
        return "DEADLINE_EXCEEDED" if over else "CANCELLED"
    return "INTERNAL" if isinstance(error, Exception) else ""


class Answering:
    """Runs checked requests on the models of a repository and counts them."""

    def __init__(self, repository: Repository, metrics: Metrics, max_bytes: int) -> None:
        self._repository = repository
        self._metrics = metrics
        self.max_bytes = max_bytes
        self.ready_model = repository.ready_model

    def find(self, name: str, version: str, kind: Kind) -> ServedModel:
        """Return the model that answers; a request for one that does not is counted as unknown."""
        try:
            return self._repository.find(name, version)
        except ServingError as error:
            self._metrics.requests.labels(UNKNOWN, UNKNOWN, kind, error.code.name).inc()
            raise

    def counted(self, model: ServedModel, kind: Kind, late: float = math.inf) -> "Counting":
        """Count the request that the body answers, by its end: answered, refused, failed or abandoned.

        `late` is for a body that is not told why it ends: cancelled or closed from then on, on the event loop's clock,
        it is because its deadline is over.
        """
        return Counting(model, kind, late)

    async def run(
        self,
        model: ServedModel,
        inputs: Mapping[str, Array],
        rows: int,
        wanted: Wanted,
        call: Call,
        parameters: Mapping[str, InferParameter] = NO_PARAMETERS,
        edits: tuple[Planned, ...] = (),
    ) -> Answered:
        """Run the rows and return what was asked for, after checking that it fits into a message.

        `parameters` are the request's: `priority` and `timeout` say how its rows wait. `edits` change layers for them.
        """
        permit(model, inputs, rows, wanted)
        manifest = model.manifest
        check_size(manifest, wanted.taps, rows, token_length(manifest, inputs), self.max_bytes, wanted.outputs)
        return await self.run_permitted(model, inputs, rows, wanted, terms_of(call, parameters), edits)

    async def run_permitted(
        self,
        model: ServedModel,
        inputs: Mapping[str, Array],
        rows: int,
        wanted: Wanted,
        terms: Terms,
        edits: tuple[Planned, ...] = (),
    ) -> Answered:
        """Run rows of a request that was permitted and whose answer was found to be not too large."""
        manifest, taps = model.manifest, wanted.taps
        if rows == 0:
            return Answered(_named(manifest, wanted, [_empty(manifest, taps)]), 0, 0, 0)
        answers = await model.run(inputs, rows, taps, bool(wanted.outputs), terms, edits)
        tensors = _named(manifest, wanted, answers)
        layers = {asked.name for asked in wanted.layers}
        model.monitor.tapped(len(taps), sum(values.nbytes for name, _, values in tensors if name in layers))
        return timed(tensors, answers)


def tell_times(response: ModelInferResponse, answered: Answered) -> None:
    """Put into the response where the time went."""
    parameters = response.parameters
    parameters["queue_ns"].int64_param = answered.queue_ns
    parameters["compute_ns"].int64_param = answered.compute_ns
    parameters["batch_rows"].int64_param = answered.batch_rows


def timed(tensors: list[Tensor], answers: Sequence[Answer]) -> Answered:
    """Return what a request is answered with, its parts' times put together."""
    if len(answers) == 1:
        answer = answers[0]
        return Answered(tensors, answer.queue_ns, answer.compute_ns, answer.batch_rows)
    return Answered(
        tensors,
        max(answer.queue_ns for answer in answers),
        sum(answer.compute_ns for answer in answers),
        max(answer.batch_rows for answer in answers),
    )


def permit(model: ServedModel, inputs: Mapping[str, Array], rows: int, wanted: Wanted) -> None:
    """Raise PermissionDenied unless the caller may have what is wanted, ResourceExhausted when that is too much."""
    if wanted.outputs:
        scopes.require(scopes.PREDICT, to="asking for outputs")
    if wanted.layers:
        scopes.require(scopes.FEATURES, to="asking for layers")
        length = token_length(model.manifest, inputs)
        check_feature_bytes(model.manifest, wanted.taps, rows, length, model.loaded.settings)


@contextmanager
def decoding() -> Iterator[None]:
    """Blame the caller for what the codec finds wrong in the body. While an answer is encoded it is our own fault."""
    try:
        yield
    except CodecError as error:
        raise InvalidArgument(str(error), field=error.field) from error


def named_rows(manifest: Manifest, tensors: Sequence[NamedTensor]) -> tuple[dict[str, Array], int]:
    """Return the inputs of a request of FeatureService by name, and their rows; InvalidArgument for wrong ones."""
    with decoding():
        inputs = decode_named(tensors)
    return inputs, check_inputs(manifest, inputs, {tensor.name: tensor.datatype for tensor in tensors})


def timing_of(answered: Answered) -> Timing:
    """Return where the time of a request of FeatureService went."""
    return Timing(queue_ns=answered.queue_ns, compute_ns=answered.compute_ns, batch_rows=answered.batch_rows)


async def off_loop(size: int, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call `function`, in another thread when it has `size` bytes to go through and that would hold up other calls."""
    if size < LARGE:
        return function(*args, **kwargs)
    return await asyncio.to_thread(function, *args, **kwargs)


def _named(manifest: Manifest, wanted: Wanted, answers: list[Answer]) -> list[Tensor]:
    """Return (name, datatype, values) in the order asked, the parts of a split request joined."""
    outputs = {spec.name: spec for spec in manifest.outputs}
    taps = wanted.layers_by_name
    tensors: list[Tensor] = []
    for name in wanted.order:
        if name in taps:
            tap = taps[name]
            values = join([answer.features[tap] for answer in answers])
            tensors.append((name, reduced_datatype(manifest.layers_by_path[tap.layer], tap), values))
        else:
            tensors.append((name, outputs[name].datatype, join([answer.outputs[name] for answer in answers])))
    return tensors


def _empty(manifest: Manifest, taps: tuple[Tap, ...]) -> Answer:
    """Return the answer to a request of no rows; dynamic dimensions are 0 in it."""
    outputs = {spec.name: np.zeros(_none(spec), memory_dtype(spec.datatype)) for spec in manifest.outputs}
    features = {}
    for tap in taps:
        layer = manifest.layers_by_path[tap.layer]
        shape = reduced_shape(_none(layer), tap.reducer)
        features[tap] = np.zeros(shape, memory_dtype(reduced_datatype(layer, tap)))
    return Answer(outputs, features, 0, 0, 0)


def _none(spec: TensorSpec | LayerSpec) -> tuple[int, ...]:
    return tuple(max(0, size) for size in spec.shape)
