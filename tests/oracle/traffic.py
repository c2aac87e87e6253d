"""A caller that asks in every way there is: plainly, for layers, with deadlines, leaving early, and wrongly."""

import itertools
import random
import threading
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np

from layercast.proto.messages import ModelInferRequest
from layercast.proto.rpc import INFERENCE
from oracle.journal import Asked, Journal, Reply
from oracle.subjects import LAYERS, Subject

_PATIENCE = 60.0
_BUSY = frozenset({"OK", "UNAVAILABLE"})
_NUMBERS = itertools.count()

Wrong = Callable[[ModelInferRequest], object]
MISTAKES: dict[str, tuple[Wrong, str]] = {
    "unknown model": (lambda m: setattr(m, "model_name", "nobody"), "NOT_FOUND"),
    "unknown version": (lambda m: setattr(m, "model_version", "77"), "NOT_FOUND"),
    "bad version": (lambda m: setattr(m, "model_version", "-1"), "INVALID_ARGUMENT"),
    "missing input": (lambda m: m.ClearField("inputs"), "INVALID_ARGUMENT"),
    "wrong datatype": (lambda m: setattr(m.inputs[0], "datatype", "FP8"), "INVALID_ARGUMENT"),
    "wrong size": (lambda m: m.inputs[0].shape.append(2), "INVALID_ARGUMENT"),
    "huge shape": (lambda m: m.inputs[0].shape.extend([2**62, 2**62]), "INVALID_ARGUMENT"),
    "negative shape": (lambda m: m.inputs[0].shape.append(-1), "INVALID_ARGUMENT"),
    "unknown output": (lambda m: m.outputs.add(name="nothing"), "INVALID_ARGUMENT"),
    "unknown layer": (lambda m: m.outputs.add(name="layer:nowhere"), "INVALID_ARGUMENT"),
    "too few bytes": (lambda m: m.raw_input_contents.__setitem__(0, b"abc"), "INVALID_ARGUMENT"),
}


class Caller:
    """Sends requests over one channel and writes their ends into the journal."""

    def __init__(self, url: str, subjects: dict[str, Subject], journal: Journal, seed: int) -> None:
        options = [("grpc.use_local_subchannel_pool", 1)]
        self._channel = grpc.insecure_channel(url, options=options)
        method = INFERENCE["ModelInfer"]
        self._infer = self._channel.unary_unary(
            method.path, method.request.SerializeToString, method.response.FromString
        )
        method = INFERENCE["ModelStreamInfer"]
        self._stream = self._channel.stream_stream(
            method.path, method.request.SerializeToString, method.response.FromString
        )
        self._subjects = list(subjects.values())
        self._journal = journal
        self.random = random.Random(seed)

    def close(self) -> None:
        """Close the channel."""
        self._channel.close()

    def predict(self) -> None:
        """Ask for the output of some rows."""
        self._wait(*self._new("predict", ["logits"], _BUSY))

    def features(self) -> None:
        """Ask for layers, with or without the output."""
        subject = self.random.choice(self._subjects)
        layers = [f"layer:{layer}" for layer in LAYERS[subject.name]]
        chosen = self.random.sample(layers, self.random.randint(1, len(layers)))
        outputs = self.random.choice([chosen, [*chosen, "logits"], ["logits", *chosen]])
        self._wait(*self._new("features", outputs, _BUSY, subject))

    def hurried(self) -> None:
        """Ask with a deadline that may well pass."""
        asked, message = self._new("hurried", ["logits"], _BUSY | {"DEADLINE_EXCEEDED"})
        self._wait(asked, message, timeout=self.random.uniform(0.0005, 0.02))

    def abandoned(self) -> None:
        """Ask, and go away at once or a little later."""
        asked, message = self._new("abandoned", ["logits"], _BUSY | {"CANCELLED"})
        self._journal.asks(asked)
        call = self._infer.future(message, timeout=_PATIENCE)
        threading.Event().wait(self.random.uniform(0, 0.003))
        call.cancel()
        self._journal.ended(asked.id, _reply(call))

    def mistaken(self) -> None:
        """Ask for something that can't be."""
        name = self.random.choice(list(MISTAKES))
        spoil, status = MISTAKES[name]
        asked, message = self._new(f"mistaken ({name})", ["logits"], frozenset({status}))
        spoil(message)
        self._wait(asked, message)

    def streamed(self) -> None:
        """Ask several times over one stream, sometimes wrongly: errors stay inside it, and each answer has its id."""
        batch = [self._new("streamed", ["logits"], _BUSY) for _ in range(self.random.randint(2, 6))]
        if self.random.random() < 0.3:
            asked, message = self._new("streamed", ["logits"], frozenset({"INVALID_ARGUMENT"}))
            message.raw_input_contents[0] = b"abc"
            batch.append((asked, message))
        for asked, _ in batch:
            self._journal.asks(asked)
        try:
            for response in self._stream(iter([message for _, message in batch]), timeout=_PATIENCE):
                self._journal.ended(response.infer_response.id, _streamed_reply(response))
        except grpc.RpcError as error:
            for asked, _ in batch:
                if not asked.ends:
                    self._journal.ended(asked.id, Reply(error.code().name, text=error.details() or ""))

    def _new(
        self, kind: str, outputs: list[str], allowed: frozenset[str], subject: Subject | None = None
    ) -> tuple[Asked, ModelInferRequest]:
        subject = subject or self.random.choice(self._subjects)
        rows = self.random.choice([1, 1, 1, 2, 3, 5, 8, 20])
        chosen = [self.random.randrange(len(subject.rows)) for _ in range(rows)]
        id = f"{next(_NUMBERS)}-{self.random.getrandbits(32):x}"
        values = subject.batch(chosen)
        message = ModelInferRequest(model_name=subject.name, id=id)
        message.inputs.add(name=subject.input, datatype=subject.datatype, shape=values.shape)
        message.raw_input_contents.append(np.ascontiguousarray(values).tobytes())
        for name in outputs:
            message.outputs.add(name=name)
        return Asked(id, subject, chosen, outputs, kind, allowed), message

    def _wait(self, asked: Asked, message: ModelInferRequest, timeout: float = _PATIENCE) -> None:
        self._journal.asks(asked)
        self._journal.ended(asked.id, _reply(self._infer.future(message, timeout=timeout)))


def _reply(call: Any) -> Reply:
    """Wait for the end of a call and return it."""
    try:
        response = call.result()
    except (grpc.RpcError, grpc.FutureCancelledError):
        return Reply(call.code().name, text=call.details() or "")
    return reply_of(response)


def reply_of(response: Any) -> Reply:
    """Return what a ModelInferResponse says."""
    values = {
        output.name: np.frombuffer(raw, "<f4").reshape(output.shape)
        for output, raw in zip(response.outputs, response.raw_output_contents, strict=True)
    }
    return Reply("OK", response.id, int(response.model_version), values)


def _streamed_reply(response: Any) -> Reply:
    if response.error_message:
        code = response.infer_response.parameters["error_code"].string_param
        return Reply(code, id=response.infer_response.id, text=response.error_message)
    return reply_of(response.infer_response)


WEIGHTS: dict[Callable[[Caller], None], int] = {
    Caller.predict: 55,
    Caller.features: 15,
    Caller.streamed: 5,
    Caller.hurried: 8,
    Caller.abandoned: 8,
    Caller.mistaken: 9,
}
"""How often each way of asking is chosen, in hundredths."""


def ask(caller: Caller) -> None:
    """Ask once, in a way chosen by weight."""
    way = caller.random.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
    way(caller)
