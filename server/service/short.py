"""A plain request on its way without a task: queued as soon as it is read, answered as soon as its rows have run."""

import asyncio
from collections.abc import Mapping
from typing import Protocol

from layercast.proto.messages import ModelInferRequest
from layercast.server.batching.waiting import Waiting
from layercast.server.errors import DeadlineCancelled
from layercast.server.model import ServedModel
from layercast.server.service.answering import Counting, timed
from layercast.server.service.plain import Plain
from layercast.server.work import Answer, Array, Terms


class Told(Protocol):
    """The call of a request: told that it has begun, and then once how it ended."""

    def begun(self) -> None:
        """The request is answered here, or fails here; nothing was told or counted before."""

    def answered(self, content: bytes) -> None:
        """This is the answer, serialised."""

    def failed(self, error: Exception) -> None:
        """There is no answer."""

    def left(self, late: bool) -> None:
        """The caller had gone, or else (`late`) its deadline was over."""


class Short:
    """One request, counted and queued; the asker of its work."""

    __slots__ = ("_call", "_counting", "_plain", "_request", "_timer", "_waiting")

    def __init__(self, model: ServedModel, plain: Plain, request: ModelInferRequest, call: Told) -> None:
        call.begun()
        self._counting: Counting | None = Counting(model, "predict")
        self._timer = self._counting.begin()
        self._plain = plain
        self._request = request
        self._call = call
        self._waiting: Waiting | None = None

    def queue(self, model: ServedModel, inputs: Mapping[str, Array], rows: int, terms: Terms) -> None:
        """Queue the rows, no more than the model's largest batch; what refuses them is told as any other end."""
        self._timer.decoded()
        try:
            model.batcher.check_room(rows, terms.peer)
            self._waiting = model.enqueue(inputs, rows, terms, self)
        except Exception as error:
            self._fail(error)

    def done(self) -> bool:
        """Tell whether the request has ended."""
        return self._counting is None

    def set_result(self, answer: Answer) -> None:
        """Encode the answer and tell the call."""
        try:
            answered = timed([], [answer])
            self._timer.ran(answered)
            content = self._plain.response(self._request, [answer], answered)
        except Exception as error:
            self._fail(error)
        else:
            self._over(None)
            self._call.answered(content)

    def set_exception(self, error: Exception) -> None:
        """Tell the call that there is no answer."""
        if self._waiting:
            self._waiting.failed(error)
        self._fail(error)

    def cancel(self, late: bool) -> None:
        """The caller has gone, or else (`late`) its deadline is over. Nothing is told any more, and no row waits."""
        if self._counting:
            if self._waiting:
                self._waiting.left(late)
            self._over(DeadlineCancelled() if late else asyncio.CancelledError())
            self._call.left(late)

    def _fail(self, error: Exception) -> None:
        self._over(error)
        self._call.failed(error)

    def _over(self, error: BaseException | None) -> None:
        counting, self._counting = self._counting, None
        if self._waiting:
            self._waiting.over()
        if counting:
            counting.end(error)
