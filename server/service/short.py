"""A plain request on its way without a task: queued as soon as it is read, answered as soon as its rows have run."""

import asyncio
import time
from collections.abc import Mapping
from typing import Protocol

from layercast.server.batching.waiting import Waiting
from layercast.server.errors import DeadlineCancelled
from layercast.server.model import ServedModel
from layercast.server.service.answering import begin, failed, succeeded
from layercast.server.service.heads import Known
from layercast.server.service.template import values_of
from layercast.server.work import Answer, Array, Terms


class Told(Protocol):
    """The call of a request: told that it has begun, and then once how it ended."""

    def begun(self, id_field: bytes) -> None:
        """The request is answered here, or fails here; nothing was told or counted before.

        `id_field` is its id as it stands in a message.
        """

    def answered(self, content: bytes) -> None:
        """This is the answer, serialised."""

    def failed(self, error: Exception) -> None:
        """There is no answer."""

    def left(self, late: bool) -> None:
        """The caller had gone, or else (`late`) its deadline was over."""


class Queued:
    """A work that was queued without a task: whether it has ended, and what is to be done where it waits."""

    __slots__ = ("_done", "_waiting")

    def __init__(self) -> None:
        self._waiting: Waiting | None = None
        self._done = False

    def done(self) -> bool:
        """Tell whether nobody waits any more."""
        return self._done

    def _over(self) -> None:
        self._done = True
        if self._waiting:
            self._waiting.over()

    def _withdraw(self, late: bool) -> BaseException:
        """Let no row wait, the caller having gone, or else (`late`) its deadline being over; return how that ends."""
        if self._waiting:
            self._waiting.left(late)
        self._over()
        return _gone(late)


def abandoned(model: ServedModel, call: Told, start: int, late: bool) -> None:
    """Count a request that came at `start`: its caller goes, or else (`late`) its deadline passes, while it waits."""
    begin(model)
    failed(model, "predict", _gone(late), start)
    (model.monitor.expired if late else model.monitor.cancelled)("queued")
    call.left(late)


def _gone(late: bool) -> BaseException:
    return DeadlineCancelled() if late else asyncio.CancelledError()


class Short(Queued):
    """One request, counted and queued; the asker of its work. It came at `start`."""

    __slots__ = ("_decoded", "_known", "_start", "call")

    def __init__(self, known: Known, start: int, call: Told, again: bool = False) -> None:
        """`again` is for one that was begun, and counted, together with others."""
        super().__init__()
        if not again:
            call.begun(known.id_field)
            begin(known.model)
        self._known = known
        self.call = call
        self._start = self._decoded = start

    def queue(self, inputs: Mapping[str, Array], terms: Terms) -> None:
        """Queue the rows, no more than the model's largest batch; what refuses them is told as any other end."""
        model, form = self._known.model, self._known.form
        self._decoded = time.perf_counter_ns() - terms.waited_ns
        try:
            model.batcher.check_room(form.rows, terms.peer)
            if form.group is None:
                form.group = model.group(inputs, exact=bool(form.taps))
            self._waiting = model.enqueue(inputs, form.rows, form.group, terms, self, form.taps, form.predict)
        except Exception as error:
            self._fail(error)

    def set_result(self, answer: Answer) -> None:
        """Encode the answer and tell the call."""
        ran, model, form = time.perf_counter_ns(), self._known.model, self._known.form
        queue_ns, compute_ns = answer.queue_ns, answer.compute_ns
        try:
            content = form.template.answer(
                self._known.id_field, values_of(answer), queue_ns, compute_ns, answer.batch_rows
            )
        except Exception as error:
            self._fail(error)
            return
        self._over()
        if form.taps:
            model.monitor.tapped(len(form.taps), sum(values.nbytes for values in answer.features.values()))
        now, start = time.perf_counter_ns(), self._start
        succeeded(model, form.kind, now - start, self._decoded - start, queue_ns, compute_ns, now - ran)
        self.call.answered(content)

    def set_exception(self, error: Exception) -> None:
        """Tell the call that there is no answer."""
        if self._waiting:
            self._waiting.failed(error)
        self._fail(error)

    def cancel(self, late: bool) -> None:
        """The caller has gone, or else (`late`) its deadline is over. Nothing is told any more, and no row waits."""
        if not self._done:
            failed(self._known.model, self._known.form.kind, self._withdraw(late), self._start)
            self.call.left(late)

    def _fail(self, error: Exception) -> None:
        self._over()
        failed(self._known.model, self._known.form.kind, error, self._start)
        self.call.failed(error)
