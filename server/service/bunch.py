"""Plain requests that came or waited together: queued as one work, and each answered as if it had come alone."""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

from layercast.server.errors import Evicted, OutOfMemory, ServingError
from layercast.server.model import Group
from layercast.server.service.answering import LARGE, begin, failed, succeeded
from layercast.server.service.heads import Known
from layercast.server.service.short import Queued, Short, Told
from layercast.server.work import Answer, Array, Course, Terms

C = TypeVar("C", bound=Told)


class Asked(NamedTuple, Generic[C]):
    """A request that was recognised, as it came, and the call that is told its end."""

    known: Known
    raw: bytes
    call: C


def bunches(requests: Iterable[Asked[C]]) -> Iterator[list[Asked[C]]]:
    """Yield the requests in order, those together that follow each other and may be queued as one work."""
    bunch: list[Asked[C]] = []
    most = 0
    for asked in requests:
        if bunch and (asked.known.form is not bunch[0].known.form or len(bunch) >= most):
            yield bunch
            bunch = []
        if not bunch:
            form = asked.known.form
            most = min(asked.known.model.loaded.settings.max_batch // form.rows, LARGE // max(1, sum(form.sizes)))
        bunch.append(asked)
    if bunch:
        yield bunch


class Bunch(Queued):
    """Requests of one form, counted and queued; the asker of their work. They came at `start`."""

    __slots__ = (
        "_alone", "_calls", "_each", "_form", "_id_fields", "_inputs", "_model", "_queued", "_shared_ns", "_start",
    )  # fmt: skip

    def __init__(self, requests: Sequence[Asked[Any]], start: int) -> None:
        super().__init__()
        self._model, self._form = requests[0].known.model, requests[0].known.form
        self._calls: list[Told] = [asked.call for asked in requests]
        self._id_fields = [asked.known.id_field for asked in requests]
        for asked in requests:
            asked.call.begun(asked.known.id_field)
        begin(self._model, len(requests))
        self._start = self._queued = start
        self._shared_ns = 0
        self._inputs: Mapping[str, Array] = {}
        self._each: Sequence[Terms] = ()
        self._alone: list[Short] = []

    def queue(self, inputs: Mapping[str, Array], terms: Terms, each: Sequence[Terms] = ()) -> None:
        """Queue the rows, which the queue has room for; what refuses them is told as any other end.

        `each` are the terms of the requests where those are not the work's: of calls that have waited for each other.
        """
        form, many = self._form, len(self._calls)
        self._inputs, self._each = inputs, each or [terms] * many
        self._queued = time.perf_counter_ns()
        self._shared_ns = self._queued - self._start - terms.waited_ns
        try:
            if form.group is None:
                form.group = self._model.group(inputs)
                form.group.bytes = sum(form.sizes)
            group = Group(form.group.key, form.group.bytes * many, form.group.length)
            course = Course(requests=many)
            own = Terms(terms.deadline, peer=terms.peer, course=course, waited_ns=terms.waited_ns)
            self._waiting = self._model.enqueue(inputs, form.rows * many, group, own, self)
        except Exception as error:
            self._fail(error)

    def set_result(self, answer: Answer) -> None:
        """Encode the answers and tell the calls."""
        ran, many = time.perf_counter_ns(), len(self._calls)
        queue_ns, compute_ns = answer.queue_ns, answer.compute_ns
        try:
            contents = self._form.template.answers(
                self._id_fields, answer.outputs, queue_ns, compute_ns, answer.batch_rows
            )
        except Exception as error:
            self._fail(error)
            return
        self._over()
        now = time.perf_counter_ns()
        decode_ns, encode_ns = self._shared_ns // many, (now - ran) // many
        succeeded(self._model, "predict", now - self._start, decode_ns, queue_ns, compute_ns, encode_ns, many)
        for call, content in zip(self._calls, contents, strict=True):
            call.answered(content)

    def set_exception(self, error: Exception) -> None:
        """Tell the calls that there is no answer; what one is to blame or enough for, the others have no part in."""
        if self._waiting:
            self._waiting.failed(error)
        if isinstance(error, Evicted):
            self._part(error)
        elif isinstance(error, OutOfMemory) or not isinstance(error, ServingError):
            self._part()
        else:
            self._fail(error)

    def cancel(self, late: bool) -> None:
        """The caller has gone, or else (`late`) its deadline is over. Nothing is told any more, and no row waits."""
        for short in self._alone:
            short.cancel(late)
        if self._done:
            return
        end = self._withdraw(late)
        for call in self._calls:
            failed(self._model, "predict", end, self._start)
            call.left(late)

    def leave(self, call: Told, late: bool) -> None:
        """One caller has gone, or else (`late`) its deadline is over. It is told nothing more.

        Only for a work that ran as soon as it was queued: what still waits are requests that were queued again, alone.
        """
        for short in self._alone:
            if short.call is call:
                short.cancel(late)

    def _part(self, last: Exception | None = None) -> None:
        """Queue each request alone, all having been admitted; but the last ends by `last` if there is that."""
        inputs, many, now = self._inputs, self._form.rows, time.perf_counter_ns()
        self._over()
        for at, (id_field, call, terms) in enumerate(zip(self._id_fields, self._calls, self._each, strict=True)):
            if last and at == len(self._calls) - 1:
                failed(self._model, "predict", last, self._start)
                call.failed(last)
                break
            start = self._queued - self._shared_ns - terms.waited_ns
            short = Short(Known(self._model, self._form, id_field, ()), start, call, again=True)
            self._alone.append(short)
            own = {name: array[at * many : (at + 1) * many] for name, array in inputs.items()}
            waited_ns = terms.waited_ns + now - self._queued
            course = Course(admitted=True)
            short.queue(own, Terms(terms.deadline, peer=terms.peer, course=course, waited_ns=waited_ns))

    def _fail(self, error: Exception) -> None:
        self._over()
        for call in self._calls:
            failed(self._model, "predict", error, self._start)
            call.failed(error)

    def _over(self) -> None:
        self._inputs = {}
        super()._over()
