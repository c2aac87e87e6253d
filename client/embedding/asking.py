"""Files to rows, rows to a layer's values: by threads, with patience for a server that restarts."""

import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from layercast.client.client import Client
from layercast.client.embedding.listing import Entry, row_of
from layercast.client.embedding.parts import form_of, other_form
from layercast.client.errors import Cancelled, DeadlineExceeded, InputError, ResourceExhausted, Unavailable
from layercast.client.types import ModelMetadata
from layercast.proto.codec import AnyArray

_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 2.0


@dataclass(slots=True)
class Answer:
    """The files of one request, those that could not be read with the reason, and the layer's values of the others."""

    entries: list[Entry] = field(default_factory=list)
    values: AnyArray | None = None
    unreadable: list[tuple[str, str]] = field(default_factory=list)


class Asker:
    """Asks for one layer of one version. Threads share it.

    A server that can't answer now is asked again until nobody had an answer for `patience` seconds. What is too much
    for one message goes in halves.
    """

    def __init__(
        self, client: Client, metadata: ModelMetadata, version: str, layer: str, directory: Path, patience: float
    ) -> None:
        self._client, self._metadata = client, metadata
        self._version, self._layer = version, layer
        self._directory, self._patience = directory, patience
        self._stopped = threading.Event()
        self._last_answer = time.monotonic()

    def answer(self, entries: Sequence[Entry]) -> Answer:
        """The layer's values for these files. Raises what the server refuses, and LayercastError after a stop."""
        found = Answer()
        rows = []
        for entry in entries:
            try:
                rows.append(row_of(self._directory, entry, self._metadata))
                found.entries.append(entry)
            except InputError as error:
                found.unreadable.append((entry.path, str(error)))
        if rows:
            found.values = self._joined(found.entries, [self._ask(batch) for batch in self._batches(rows)])
        return found

    def stop(self) -> None:
        """Let the threads end now: no further attempt, and calls in flight are cancelled."""
        self._stopped.set()
        self._client.close()

    def _joined(self, entries: Sequence[Entry], answers: Sequence[AnyArray]) -> AnyArray:
        start = 0
        for values in answers:
            if (form := form_of(values)) != form_of(answers[0]):
                raise other_form(entries[start].path, form, form_of(answers[0]))
            start += len(values)
        return np.concatenate(answers)

    def _batches(self, rows: Sequence[AnyArray]) -> list[AnyArray]:
        """Rows that fit together as one array; texts are filled up to the longest."""
        preprocessing = self._metadata.preprocessing or {}
        if preprocessing.get("kind") == "text":
            longest = max(row.shape[1] for row in rows)
            pad = int(preprocessing["pad"])
            rows = [np.pad(row, ((0, 0), (0, longest - row.shape[1])), constant_values=pad) for row in rows]
        batches: list[list[AnyArray]] = []
        for row in rows:
            if batches and (batches[-1][0].shape, batches[-1][0].dtype) == (row.shape, row.dtype):
                batches[-1].append(row)
            else:
                batches.append([row])
        return [np.concatenate(batch) for batch in batches]

    def _ask(self, rows: AnyArray) -> AnyArray:
        began, pause = time.monotonic(), _FIRST_PAUSE
        while True:
            try:
                arrays = self._client.features(self._metadata.name, rows, self._layer, version=self._version)
            except (Unavailable, DeadlineExceeded, Cancelled):
                if self._stopped.is_set() or self._waited(began) > self._patience:
                    raise
                # Not all threads at the same moment.
                self._stopped.wait(pause * random.uniform(0.5, 1))
                pause = min(2 * pause, _LONGEST_PAUSE)
            except ResourceExhausted:
                if len(rows) == 1:
                    raise
                half = len(rows) // 2
                return np.concatenate([self._ask(rows[:half]), self._ask(rows[half:])])
            else:
                self._last_answer = time.monotonic()
                return self._only(arrays, len(rows))

    def _waited(self, began: float) -> float:
        """Seconds in which nobody had an answer, of those since `began`."""
        return time.monotonic() - max(began, self._last_answer)

    def _only(self, arrays: dict[str, AnyArray], rows: int) -> AnyArray:
        if len(arrays) != 1:
            names = ", ".join(list(arrays)[:5])
            raise InputError(f"--layer {self._layer!r} selects {len(arrays)} layers ({names}); name one of them")
        (values,) = arrays.values()
        if values.shape[:1] != (rows,):
            raise InputError(f"layer {self._layer!r} gives {list(values.shape)} for {rows} rows; it has no row each")
        return values
