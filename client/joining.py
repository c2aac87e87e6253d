"""Joins the messages of a stream of layers to arrays, and notices when something is missing."""

from collections.abc import Iterable, Iterator
from typing import Any

from layercast.client.errors import InternalError
from layercast.client.translation import decoding, pass_on
from layercast.proto.codec import AnyArray, decode_named
from layercast.proto.messages import ExtractStreamResponse, NamedTensor, TensorPart


def joined(model: str, responses: Iterable[Any]) -> Iterator[dict[str, AnyArray]]:
    """Yield the arrays of some rows after the other; InternalError when something is missing."""
    joining = Joining(model)
    for response in responses:
        if (arrays := joining.add(response)) is not None:
            yield arrays
    joining.end()


class Joining:
    """What one stream has brought so far, of the row that is not complete yet."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._rows = 0
        self._total: int | None = None
        self._open: dict[tuple[str, str], tuple[TensorPart, list[bytes]]] = {}

    def add(self, response: ExtractStreamResponse) -> dict[str, AnyArray] | None:
        """Return the arrays of the rows that are complete with this message, None when there are none.

        InternalError when something between it and the message before is missing.
        """
        pass_on(response.warning)
        if self._total is None:
            self._total = response.total_rows
        if response.first_row != self._rows or response.total_rows != self._total:
            raise self._missing(f"row {self._rows} was to come, row {response.first_row} came")
        for section, parts in (("layers", response.layers), ("outputs", response.outputs)):
            for part in parts:
                self._collect(section, part)
        if response.partial:
            return None
        tensors = [
            NamedTensor(name=first.name, datatype=first.datatype, shape=first.shape, data=b"".join(pieces))
            for first, pieces in self._open.values()
        ]
        self._open.clear()
        with decoding(self._model):
            arrays = decode_named(tensors, kind="output", limit=None)
        if any(len(array) != response.rows for array in arrays.values()):
            raise self._missing(f"{response.rows} rows were to come at row {self._rows}")
        self._rows += response.rows
        return arrays

    def end(self) -> None:
        """The stream has ended well; InternalError unless everything has come."""
        if self._rows != self._total or self._open:
            raise self._missing(f"it ended at row {self._rows} of {self._total}")

    def _collect(self, section: str, part: TensorPart) -> None:
        _, pieces = self._open.setdefault((section, part.name), (part, []))
        have = sum(map(len, pieces))
        if part.offset != have:
            raise self._missing(f"{part.name!r} was to go on at byte {have}, it goes on at {part.offset}")
        pieces.append(part.data)

    def _missing(self, what: str) -> InternalError:
        return InternalError(f"a part of the answer of model {self._model!r} is missing: {what}")
