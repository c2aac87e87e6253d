"""A model whose requests wait for each other, asked without a transport."""

import threading
from typing import Any

import numpy as np
import pytest
from begin import Subject, sums
from ends import soon
from numeric import Arrays

from layercast.server.inline import up_to
from layercast.server.service import gathering
from layercast.server.service.callers import Callers

BATCH = 3
INLINE = up_to(8)
ENOUGH = Callers.enough


def batches_of_three(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take it that there are callers enough for batches of three, and few milliseconds until all are here."""
    monkeypatch.setattr(Callers, "enough", lambda self, requests: self._all_here or requests >= BATCH)


def hurried(monkeypatch: pytest.MonkeyPatch) -> float:
    """Return a deadline that waits for nobody, and that is not over soon on a busy machine."""
    monkeypatch.setattr(gathering, "_SOON_SECONDS", 60.0)
    return soon(30)


class Gathering(Subject):
    """A model whose requests wait for each other, from the first on."""

    def __init__(self, *args: Any, **model: Any) -> None:
        self.ran: list[threading.Thread] = []
        function, *rest = args or [sums]

        def noted(inputs: Arrays) -> dict[str, np.ndarray]:
            self.ran.append(threading.current_thread())
            return function(inputs)

        super().__init__(True, noted, *rest, **{"inline": INLINE, **model})
        self.function = function

    @property
    def waiting(self) -> int:
        return sum(len(each._waiting) for each in self.service._gatherings.values())

    @property
    def batches(self) -> list[float]:
        """How many rows the forwards had: of up to 1, 2, 4 rows and so on."""
        samples = self.metrics.batch_rows.labels("m", "1").samples()
        found = {suffix: value for suffix, _, value in samples if suffix != "_bucket"}
        return [found["_count"], found["_sum"]]


def ended(subject: Subject, code: str) -> float:
    return subject.metrics.requests.labels("m", "1", "predict", code).value


def started(subject: Subject) -> float:
    return next(value for name, value in subject.counts().items() if name[0] == "grpc_server_started_total")
