"""What one stream has in flight: a slot for each request, in their order, which is that of the answers too."""

import asyncio
import functools
import math
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from itertools import islice, takewhile
from typing import Any, Final

from layercast.proto.fields import mark
from layercast.proto.messages import InferParameter, ModelInferResponse, ModelStreamInferResponse
from layercast.server.batching.policy import late_from
from layercast.server.errors import expected
from layercast.server.service.bunch import Bunch
from layercast.server.service.call import Call
from layercast.server.service.short import Short

MAX_IN_FLIGHT: Final = 256
"""Requests of one stream that are read and not yet answered; what comes beyond waits unread, with the sender."""

_DEEP: Final = 16
"""Unanswered requests from which on a stream is one that sends far ahead."""
_TOGETHER: Final = 32
"""What such a stream sends more is started together, so many at a time, ..."""
_GATHER_SECONDS: Final = 0.003
"""... or after so long, which is less than it takes to answer those before."""

_EARLY_SECONDS: Final = 0.001
"""How long before its time a timer may come: some event loops count in milliseconds."""
_FINAL: Final = ModelInferResponse(
    parameters={"triton_final_response": InferParameter(bool_param=True)}
).SerializeToString()

Begin = Callable[[Sequence[tuple[bytes, "Slot"]]], None]
"""Begins to answer serialised requests. Each slot is told the end, perhaps at once."""


class Slot:
    """The place of one request of `size` bytes in its stream; told how it ended, also as the call of a short one.

    `outcome` is the serialised answer, or what ends the whole stream once it is this request's turn.
    """

    __slots__ = ("_flight", "_id_field", "_late", "_under_way", "outcome", "size")

    def __init__(self, flight: "Flight", size: int) -> None:
        self.size = size
        self.outcome: bytes | BaseException | None = None
        self._flight = flight
        self._id_field = b""
        self._late = 0.0
        self._under_way: Short | Bunch | asyncio.Task[bytes] | None = None

    @property
    def is_idle(self) -> bool:
        """Whether the request has not ended, and nothing is on its way to that."""
        return self.outcome is None and self._under_way is None

    def begun(self, id_field: bytes) -> None:
        """The request has this id, as it stands in a message."""
        self._id_field = id_field

    def answered(self, content: bytes) -> None:
        """This is the answer, a serialised ModelInferResponse."""
        self._end(_mark(len(content) + len(_FINAL)) + content + _FINAL)

    def failed(self, error: Exception) -> None:
        """There is no answer: its place is taken by what says so, or the stream ends here."""
        shown = expected(error, "ModelStreamInfer")
        call = self._flight.call
        if call.fails_whole or _over(call):
            self._end(shown)
            return
        answer = ModelStreamInferResponse(error_message=shown.message)
        answer.infer_response.MergeFromString(self._id_field)
        answer.infer_response.parameters["error_code"].string_param = shown.code.name
        answer.infer_response.parameters["triton_final_response"].bool_param = True
        self._end(answer.SerializeToString())

    def left(self, late: bool) -> None:
        """The caller had gone."""

    def wait_for(self, begun: Short | Bunch) -> None:
        """The answer comes from there, unless it came already."""
        if self.outcome is None:
            self._under_way, self._late = begun, self._flight.late()

    def run(self, answer: Coroutine[Any, Any, bytes]) -> None:
        """Let a task make the answer, a serialised ModelInferResponse."""
        task = self._under_way = asyncio.get_running_loop().create_task(answer)
        task.add_done_callback(self._ran)

    def close(self) -> "asyncio.Task[bytes] | None":
        """Nobody waits for the answer any more; return the task, cancelled, that is about to make it."""
        under_way, self._under_way = self._under_way, None
        if isinstance(under_way, Short | Bunch):
            under_way.cancel(late=_now() >= self._late)
            return None
        if under_way:
            under_way.cancel()
        return under_way

    def _ran(self, task: "asyncio.Task[bytes]") -> None:
        if task.cancelled():
            self._end(asyncio.CancelledError())
        elif (error := task.exception()) is None:
            self.answered(task.result())
        elif isinstance(error, Exception):
            self.failed(error)
        else:
            self._end(error)

    def _end(self, outcome: bytes | BaseException) -> None:
        self.outcome, self._under_way = outcome, None
        self._flight.ended(self)


class Flight:
    """The requests of one stream that are not answered yet, bounded in number and in bytes.

    A front end may hand over `together`, in one pass of the event loop, all that came: requests are begun once no more
    is there. grpc.aio gives one message at a time, each in a pass of its own. Answered one by one, they would run in
    many small batches; so what a stream sends far ahead is gathered for a moment and begun together.
    """

    def __init__(self, call: Call, max_bytes: int, begin: Begin, together: bool) -> None:
        self.call = call
        self._max_bytes = max_bytes
        self._begin = begin
        self._together = together
        self._slots: deque[Slot] = deque()
        self._gathered: list[tuple[bytes, Slot]] = []
        self._gather_until: asyncio.TimerHandle | None = None
        self._bytes = 0
        self._no_more = False
        # For the writer, which waits for the oldest answer, and the reader, which waits for room.
        self._is_ready = asyncio.Event()
        self._has_left = asyncio.Event()

    def has_room(self, size: int) -> bool:
        """Whether a request of `size` bytes may enter; one alone always may."""
        count = len(self._slots)
        return not count or (count < MAX_IN_FLIGHT and self._bytes + size <= self._max_bytes)

    async def room(self, size: int) -> None:
        """Wait until there is room."""
        self._start()
        while not self.has_room(size):
            self._has_left.clear()
            await self._has_left.wait()

    def enter(self, raw: bytes) -> None:
        """Take a request in, to be answered together with those that come next."""
        slot = Slot(self, len(raw))
        self._bytes += slot.size
        self._slots.append(slot)
        self._gathered.append((raw, slot))
        if self._together:
            return
        if self._started() < _DEEP or len(self._gathered) >= _TOGETHER:
            self._start()
        elif self._gather_until is None:
            self._gather_until = asyncio.get_running_loop().call_later(_GATHER_SECONDS, self._start)

    def came(self) -> None:
        """All that came together is in."""
        if self._together:
            self._start()

    def late(self) -> float:
        """Return from when on a cancel of a request that begins now is the deadline's."""
        return math.inf if self.call.deadline is None else late_from(self.call.deadline, _now())

    def end(self) -> None:
        """No more requests come."""
        self._no_more = True
        self._start()
        self._is_ready.set()

    def ended(self, slot: Slot) -> None:
        """A request has its answer, or none."""
        if self._slots and self._slots[0] is slot:
            self._is_ready.set()

    async def front(self) -> list[bytes]:
        """Wait for the oldest answer; return it and those behind it that are ready, or none when no more come.

        Where messages go out one by one, so do answers, for each makes room. Raises what ends the stream instead.
        """
        while not self._slots or self._slots[0].outcome is None:
            if self._no_more and not self._slots:
                return []
            self._is_ready.clear()
            await self._is_ready.wait()
        oldest = self._slots[0].outcome
        if isinstance(oldest, BaseException):
            raise oldest
        outcomes = (slot.outcome for slot in islice(self._slots, None if self._together else 1))
        return [outcome for outcome in takewhile(_is_answer, outcomes) if isinstance(outcome, bytes)]

    def leave(self, many: int) -> None:
        """The oldest requests, so many, have been answered."""
        for _ in range(many):
            self._bytes -= self._slots.popleft().size
        if self._gathered and self._started() < _DEEP:
            self._start()
        self._has_left.set()

    def close(self) -> "list[asyncio.Task[bytes]]":
        """Withdraw what is not answered; return the tasks that are to end with it."""
        if self._gather_until:
            self._gather_until.cancel()
        self._gathered.clear()
        tasks = [task for slot in self._slots if (task := slot.close())]
        self._slots.clear()  # an error that was raised from one refers to them
        return tasks

    def _started(self) -> int:
        return len(self._slots) - len(self._gathered)

    def _start(self) -> None:
        if self._gather_until:
            self._gather_until.cancel()
            self._gather_until = None
        gathered, self._gathered = self._gathered, []
        if not gathered:
            return
        try:
            self._begin(gathered)
        except Exception as error:
            for _, slot in gathered:
                if slot.is_idle:
                    slot.failed(error)


def _is_answer(outcome: object) -> bool:
    return isinstance(outcome, bytes)


def _now() -> float:
    return asyncio.get_running_loop().time()


def _over(call: Call) -> bool:
    """Whether the time of the whole stream has passed: there is nobody to go on for."""
    return call.deadline is not None and _now() >= call.deadline - _EARLY_SECONDS


# The answers of a stream have few sizes.
@functools.lru_cache(maxsize=1024)
def _mark(size: int) -> bytes:
    return mark(ModelStreamInferResponse, "infer_response", size)
