"""The front end `direct`: peers that say nothing, at first or after a while."""

import pytest
from direct import assert_alive
from h2.errors import ErrorCodes
from h2_frames import ACK, PREFACE, Kind, settings_frame

from layercast.server.transport.direct import connection


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(connection, "_FIRST_SECONDS", 0.2)
    monkeypatch.setattr(connection, "_QUIET_SECONDS", 0.2)
    monkeypatch.setattr(connection, "_REPLY_SECONDS", 0.2)


@pytest.mark.parametrize("data", [b"", PREFACE[:10], PREFACE, PREFACE + settings_frame({})[:4]])
def test_who_does_not_greet_is_left(connect, impatient, data):
    peer = connect(greet=False)
    peer.send(data)
    assert peer.ends() is ErrorCodes.PROTOCOL_ERROR


def test_who_is_quiet_is_asked_and_may_stay(connect, impatient):
    peer = connect()
    for _ in range(3):
        seen = len(peer.frames)
        peer.until(lambda seen=seen: any(found.kind == Kind.PING for found in peer.frames[seen:]))
        asked = peer.frames[-1]
        assert not asked.flags & ACK
        peer.frame(Kind.PING, ACK, 0, asked.payload)
    assert_alive(peer, 1)


def test_who_does_not_answer_is_left(connect, impatient):
    peer = connect()
    peer.ends()
    assert any(found.kind == Kind.PING for found in peer.frames)
