"""Recognises serialised requests by all that stands before their values, which a client sends again and again.

A message is a row of fields. These are read as protobuf's own writers order them: the model's name and version, the
id, everything else, and last the values. What stood in a message that was parsed once need not be parsed again; only
the id and the values differ, and of these the marks before them tell where each ends. Any other message is parsed.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Final

from google.protobuf.message import DecodeError

from layercast.proto.fields import mark
from layercast.proto.messages import ModelInferRequest
from layercast.server.model import ServedModel
from layercast.server.service.form import Form

_NAME: Final = mark(ModelInferRequest, "model_name", 0)[0]
_VERSION: Final = mark(ModelInferRequest, "model_version", 0)[0]
_ID: Final = mark(ModelInferRequest, "id", 0)[0]
_LONG: Final = 128
"""From this size on the mark of a field has more than two bytes."""
_LONGEST: Final = 2048
_MOST: Final = 1024


class Known:
    """A request that was recognised: its id as it stands in a message, its form, and the bytes of each input."""

    __slots__ = ("contents", "form", "id_field", "model")

    def __init__(self, model: ServedModel, form: Form, id_field: bytes, contents: Sequence[bytes]) -> None:
        self.model = model
        self.form = form
        self.id_field = id_field
        self.contents = contents


class _Model:
    """The heads of messages that begin with the same model's name and version."""

    def __init__(self, name: str, version: str, model: ServedModel) -> None:
        self.name = name
        self.version = version
        self.mark = weakref.ref(model.mark)
        self.lengths: dict[int, int] = {}
        self.forms: dict[bytes, tuple[Form, Sequence[bytes]]] = {}


class Heads:
    """`ready` returns the model that answers for a name and a version, None when there is none."""

    def __init__(self, ready: Callable[[str, str], ServedModel | None]) -> None:
        self._ready = ready
        self._models: dict[bytes, _Model] = {}

    def known(self, raw: bytes) -> Known | None:
        """Return what the message asks if its like was learned."""
        return self._known(raw, {})

    def all_known(self, messages: Sequence[bytes]) -> list[Known | None]:
        """Return the same of each message."""
        ready: dict[_Model, ServedModel | None] = {}
        return [self._known(raw, ready) for raw in messages]

    def _known(self, raw: bytes, ready: dict[_Model, ServedModel | None]) -> Known | None:
        """`ready` holds the models that answer now, as far as they were looked up."""
        try:
            named, described = _split(raw)
        except IndexError:
            return None
        known = self._models.get(raw[:named])
        if known is None:
            return None
        length = known.lengths.get(len(raw) - described)
        if length is None:
            return None
        at = described + length
        found = known.forms.get(raw[described:at])
        id_field = raw[named:described]
        if found is None or not id_field.isascii():
            return None
        if known not in ready:
            model = self._ready(known.name, known.version)
            ready[known] = model if model and known.mark() is model.mark else None
        model = ready[known]
        if model is None:
            return None
        form, marks = found
        contents = (raw[at:],) if len(marks) == 1 else _contents(raw, at, form.sizes, marks)
        return Known(model, form, id_field, contents) if tuple(map(len, contents)) == form.sizes else None

    def learn(self, raw: bytes, request: ModelInferRequest, model: ServedModel, form: Form) -> None:
        """Remember what stands before the values of `raw`, which `request` was parsed from; if it is in order."""
        marks = [mark(ModelInferRequest, "raw_input_contents", size) for size in form.sizes]
        values = b"".join(part for pair in zip(marks, request.raw_input_contents, strict=True) for part in pair)
        try:
            named, described = _split(raw)
            end = len(raw) - len(values)
            if end < described:  # values that come first; compiled, such a slice is an error
                return
            middle = raw[described:end]
            if len(middle) > _LONGEST or not raw.endswith(values) or not _whole(raw, named, described, middle, request):
                return
        except (IndexError, DecodeError):
            return
        known = self._models.get(raw[:named])
        if known is None or known.mark() is not model.mark:
            if len(self._models) >= _MOST:
                self._models.clear()
            known = self._models[raw[:named]] = _Model(request.model_name, request.model_version, model)
        if len(known.forms) >= _MOST:
            known.forms.clear()
            known.lengths.clear()
        head = middle + marks[0]
        known.lengths[len(raw) - described] = len(head)
        known.forms[head] = form, marks


def _split(raw: bytes) -> tuple[int, int]:
    """Return where the model's name and version end, and where the id does; IndexError when the message is shorter.

    Right only for messages in the usual order, which `_whole` finds out.
    """
    at = 2 + raw[1]
    if raw[at] == _VERSION:
        at += 2 + raw[at + 1]
    if raw[at] == _ID and raw[at + 1] < _LONG:
        return at, at + 2 + raw[at + 1]
    return at, at


def _whole(raw: bytes, named: int, described: int, middle: bytes, request: ModelInferRequest) -> bool:
    """Tell whether each part of the message consists of whole fields, and which: parsed alone, it says the same."""
    names, own, rest = map(ModelInferRequest.FromString, (raw[:named], raw[named:described], middle))
    return bool(
        raw[0] == _NAME
        and names == ModelInferRequest(model_name=request.model_name, model_version=request.model_version)
        and own == ModelInferRequest(id=request.id)
        and rest == ModelInferRequest(inputs=request.inputs, outputs=request.outputs)
    )


def _contents(raw: bytes, at: int, sizes: Sequence[int], marks: Sequence[bytes]) -> Sequence[bytes]:
    """Return the inputs' bytes, of which the first begins at `at`, and last what follows if anything does.

    Nothing when another mark than is known stands between them.
    """
    found = []
    for size, before in zip(sizes, (b"", *marks[1:]), strict=True):
        if not raw.startswith(before, at):
            return ()
        at += len(before) + size
        found.append(raw[at - size : at])
    return found if at == len(raw) else (*found, raw[at:])
