"""The front end `direct`: bodies of many frames mean the same however much of them comes at once."""

from dataclasses import dataclass, field
from typing import Any

import pytest
from h2_frames import END_STREAM, PADDED, PREFACE, Kind, frame, settings_frame

from layercast.server.transport.direct.calm import Calm
from layercast.server.transport.direct.frames import MAX_PAYLOAD, Code, ConnectionFault
from layercast.server.transport.direct.reading import Reader

GREETING = PREFACE + settings_frame({})
HEAD = 9


@dataclass
class Hearer:
    """Keeps what was said of bodies."""

    deaf: bool = False
    told: list[tuple[int, bytes, int, bool]] = field(default_factory=list)

    def on_data(self, number: int, payload: bytes, size: int, ended: bool) -> None:
        self.told.append((number, payload, size, ended))

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None


def heard(data: bytes, step: int = 1 << 20) -> list[tuple[int, bytes, int, bool]]:
    """Return what a reader says of bodies when `data` comes in pieces of `step` bytes."""
    hearer = Hearer()
    reader = Reader(hearer, hearer, Calm())
    for at in range(0, len(data), step):
        reader.feed(data[at : at + step])
    return hearer.told


def bodies(told: list[tuple[int, bytes, int, bool]]) -> list[tuple[int, bytes, int, bool]]:
    """Return the same with what was said of one body, part after part, put together."""
    joined: list[tuple[int, bytes, int, bool]] = []
    for number, payload, size, ended in told:
        if joined and joined[-1][0] == number and not joined[-1][3]:
            _, before, counted, _ = joined.pop()
            joined.append((number, before + payload, counted + size, ended))
        else:
            joined.append((number, payload, size, ended))
    return joined


def data(stream: int, payload: bytes, flags: int = 0) -> bytes:
    return frame(Kind.DATA, flags, stream, payload)


def test_frames_of_one_body_that_come_together_are_told_together():
    body = [bytes([at]) * MAX_PAYLOAD for at in range(6)] + [b"end"]
    sent = b"".join(data(1, part) for part in body[:-1]) + data(1, body[-1], END_STREAM)
    whole = b"".join(body)
    assert heard(GREETING + sent) == [(1, whole, len(whole), True)]


def test_a_body_is_told_apart_from_what_follows_it():
    sent = data(1, b"a") + data(1, b"b", END_STREAM) + data(1, b"c") + data(3, b"d") + data(3, b"e")
    assert heard(GREETING + sent) == [(1, b"ab", 2, True), (1, b"c", 1, False), (3, b"de", 2, False)]


def test_padding_counts_and_is_no_part_of_a_body():
    padded = data(1, b"\3b" + bytes(3), PADDED)
    last = data(1, b"\1d\0", PADDED | END_STREAM)
    told = heard(GREETING + data(1, b"a") + padded + data(1, b"c") + last)
    assert bodies(told) == [(1, b"abcd", 10, True)]


def test_other_frames_in_between_are_heard():
    ping = frame(Kind.PING, 0, 0, bytes(8))
    assert heard(GREETING + data(1, b"a") + ping + data(1, b"b")) == [(1, b"a", 1, False), (1, b"b", 1, False)]


@pytest.mark.parametrize("step", [1, HEAD, 11, 100])
def test_pieces_of_any_size_say_the_same(step):
    sent = GREETING + b"".join((
        data(1, b"a" * 30), data(1, b"b" * 40), data(3, b"c"), data(1, b"\2d\0\0", PADDED), data(1, b""),
        data(1 | 1 << 31, b"e"), data(1, b"", END_STREAM), data(3, b"f", END_STREAM),
    ))  # fmt: skip
    assert bodies(heard(sent, step)) == bodies(heard(sent))


def test_empty_frames_within_a_body_are_not_free():
    with pytest.raises(ConnectionFault) as fault:
        heard(GREETING + data(1, b"a") + data(1, b"") * 20_000)
    assert fault.value.code == Code.ENHANCE_YOUR_CALM


def test_a_frame_too_large_within_a_body_ends_the_connection():
    with pytest.raises(ConnectionFault) as fault:
        heard(GREETING + data(1, b"a") + data(1, b"b" * (MAX_PAYLOAD + 1)))
    assert fault.value.code == Code.FRAME_SIZE_ERROR
