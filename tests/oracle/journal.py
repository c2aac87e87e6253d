"""What was asked, how it ended, and whether that is right. Safe to write to from many threads."""

import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from oracle.subjects import TOLERANCE, Array, Subject


@dataclass(frozen=True)
class Reply:
    """The end of a request: its status, and for OK the id, the version and the values that came."""

    status: str
    id: str = ""
    version: int = 0
    values: dict[str, Array] = field(default_factory=dict)
    text: str = ""


@dataclass
class Asked:
    """A request: what it wants of which rows, which ends are right for it, the ends it had and what was wrong."""

    id: str
    subject: Subject
    chosen: list[int]
    outputs: Sequence[str]
    kind: str
    allowed: frozenset[str]
    ends: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


class Journal:
    """Every request by its id. Answers are judged as they come and not kept, so that a run may last for days."""

    def __init__(self) -> None:
        self.asked: dict[str, Asked] = {}
        self._strays: list[str] = []
        self._lock = threading.Lock()

    def asks(self, asked: Asked) -> None:
        """Write down a request before it is sent."""
        with self._lock:
            self.asked[asked.id] = asked

    def ended(self, id: str, reply: Reply) -> None:
        """Write down an end; one of a request that nobody made is kept as a stray."""
        with self._lock:
            asked = self.asked.get(id)
            if asked is None:
                self._strays.append(id)
                return
            asked.ends.append(reply.status)
        asked.faults += _faults(asked, reply)

    def counts(self) -> Counter[str]:
        """Return how many requests ended how, by `kind status`."""
        return Counter(f"{asked.kind} {end}" for asked in self.asked.values() for end in asked.ends)

    def wrong(self) -> list[str]:
        """Return a line about everything that is not right: lost, answered twice, swapped, wrong or a wrong status."""
        found = [f"{id}: an answer to a request that nobody made" for id in self._strays]
        for asked in self.asked.values():
            faults = list(asked.faults)
            if len(asked.ends) != 1:
                faults.append(f"{len(asked.ends)} ends" if asked.ends else "lost")
            found += [f"{asked.id} ({asked.kind} {asked.subject.name}): {fault}" for fault in faults]
        return found


def _faults(asked: Asked, end: Reply) -> list[str]:
    if end.status not in asked.allowed:
        return [f"status {end.status} ({end.text}), want one of {sorted(asked.allowed)}"]
    if end.status != "OK":
        return []
    if end.id != asked.id:
        return [f"the id of another request: {end.id}"]
    if end.version not in asked.subject.answers:
        return [f"version {end.version}, which does not exist"]
    if list(end.values) != list(asked.outputs):
        return [f"outputs {list(end.values)}, want {list(asked.outputs)}"]
    return [fault for name, values in end.values.items() if (fault := _wrong_values(asked, end.version, name, values))]


def _wrong_values(asked: Asked, version: int, name: str, values: Array) -> str:
    right = asked.subject.right(version, name, asked.chosen)
    if values.shape != right.shape:
        return f"{name}: shape {values.shape}, want {right.shape}"
    if not np.allclose(values, right, rtol=TOLERANCE, atol=TOLERANCE):
        return f"{name}: off by {np.abs(values - right).max():.3g} from version {version}'s answer"
    return ""
