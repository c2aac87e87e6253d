"""The front end `direct`: clients that send without end, or never read, cost bounded memory and hold up nobody."""

import contextlib
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import grpc
import numpy as np
import pytest
from direct import MESSAGE_LIMIT, OK, assert_alive, ended, floats, held
from h2.errors import ErrorCodes
from h2.settings import SettingCodes
from h2_frames import END_HEADERS, LARGEST_WINDOW, Kind, call_headers, frame, message, settings_frame
from h2_peer import Peer
from numeric import asked
from serving import Running
from test_server_inference import wait_until
from test_wire import PeakMemory

from layercast.proto.messages import ServerLiveRequest

FEW = 24 << 20  # what all of a flood may cost; the servers' own work in between is in it
CALL = call_headers("ServerLive")


class Others:
    """Calls of another client, one after the other."""

    def __init__(self, server: Running) -> None:
        self.count = 0
        self.failed: list[Exception] = []
        self._server, self._over = server, threading.Event()

    def run(self) -> None:
        while not self._over.is_set():
            try:
                self._server.call("ServerLive", ServerLiveRequest(), timeout=5)
            except grpc.RpcError as error:
                self.failed.append(error)
                return
            self.count += 1

    def stop(self) -> None:
        self._over.set()


@contextmanager
def others_served(server: Running) -> Iterator[Others]:
    """See that another client is answered all the while, each time within five seconds."""
    others = Others(server)
    thread = threading.Thread(target=others.run)
    thread.start()
    try:
        yield others
    finally:
        others.stop()
        thread.join()
    assert not others.failed
    assert others.count > 0


def pour(peer: Peer, chunk: bytes, times: int) -> bool:
    """Send without reading, until the server has closed, or takes no more, or all is sent; return whether it is."""
    peer.socket.settimeout(1)
    try:
        for _ in range(times):
            peer.send(chunk)
    except (ConnectionError, TimeoutError):
        return False
    finally:
        peer.socket.settimeout(20)
    return True


def was_borne_or_cut_off(peer: Peer, all_sent: bool) -> None:
    """The server has read all of it, or has ended the connection, and says for what."""
    if all_sent:
        with contextlib.suppress(ConnectionError):
            peer.frame(Kind.PING, payload=b"all read")
        while peer.read() is not None and peer.frames[-1].payload != b"all read":
            pass
        if not peer.closed:
            return
    # None: what we had still sent cut its words off.
    assert peer.ends() in (ErrorCodes.ENHANCE_YOUR_CALM, None)


FLOODS = {
    "PING": frame(Kind.PING, payload=bytes(8)),
    "PING acknowledged": frame(Kind.PING, 1, payload=bytes(8)),
    "SETTINGS": settings_frame({SettingCodes.INITIAL_WINDOW_SIZE: 1}) + settings_frame({}),
    "SETTINGS acknowledged": settings_frame({}, 1),
    "SETTINGS, full": frame(Kind.SETTINGS, payload=struct.pack(">HI", SettingCodes.INITIAL_WINDOW_SIZE, 7) * 2700),
    "PRIORITY": frame(Kind.PRIORITY, 0, 99, struct.pack(">IB", 0, 7)),
    "unknown": frame(0x77, 0, 0, b""),
    "WINDOW_UPDATE": frame(Kind.WINDOW_UPDATE, 0, 1, b"\0\0\0\1"),
    "DATA, empty": frame(Kind.DATA, 0, 1, b""),
    "DATA, padding": frame(Kind.DATA, 8, 1, b"\0"),
}


@pytest.mark.parametrize("flood", FLOODS)
def test_a_flood_of_frames_is_cut_off_or_borne(connect, direct, flood):
    peer = connect()
    peer.headers(1, call_headers("ModelInfer"))
    one = FLOODS[flood]
    chunk = one * max(1, 32_768 // len(one))
    with others_served(direct), PeakMemory() as peak:
        all_sent = pour(peer, chunk, 300)
    assert peak.bytes < FEW
    was_borne_or_cut_off(peer, all_sent)


def test_a_flood_of_empty_continuations_is_cut_off(connect, direct):
    peer = connect()
    peer.headers(1, CALL, flags=0)
    with others_served(direct), PeakMemory() as peak:
        pour(peer, frame(Kind.CONTINUATION, 0, 1, b"") * 4000, 300)
    assert peak.bytes < FEW
    was_borne_or_cut_off(peer, all_sent=False)


@pytest.mark.parametrize("name", ["ServerLive", "ModelInfer", "ModelStreamInfer", "/no/rpc"])
def test_calls_that_are_reset_as_they_open_are_cut_off(connect, direct, name):
    """Rapid reset (CVE-2023-44487)."""
    peer = connect()
    block = peer.encoder.encode(call_headers(name))
    with others_served(direct), PeakMemory() as peak:
        for first in range(1, 100_001, 2000):
            chunk = b"".join(
                frame(Kind.HEADERS, END_HEADERS, stream, block) + frame(Kind.RST_STREAM, 0, stream, b"\0\0\0\x08")
                for stream in range(first, first + 2000, 2)
            )
            all_sent = pour(peer, chunk, 1)
    assert peak.bytes < FEW
    was_borne_or_cut_off(peer, all_sent)


def test_calls_that_the_server_is_made_to_reset_are_cut_off_too(connect, direct):
    """MadeYouReset (CVE-2025-8671): a window that opens by nothing makes the server end the call itself."""
    peer = connect()
    block = peer.encoder.encode(call_headers("ModelInfer"))
    body = message(floats(1).SerializeToString())
    with held(direct) as batcher, others_served(direct), PeakMemory() as peak:
        for first in range(1, 100_001, 1000):
            chunk = b"".join(
                frame(Kind.HEADERS, END_HEADERS, stream, block)
                + frame(Kind.DATA, 1, stream, body)
                + frame(Kind.WINDOW_UPDATE, 0, stream, bytes(4))
                for stream in range(first, first + 1000, 2)
            )
            all_sent = pour(peer, chunk, 1)
        wait_until(direct, lambda: batcher.queued_rows == 0)
    assert peak.bytes < FEW
    was_borne_or_cut_off(peer, all_sent)


@pytest.mark.parametrize("wrong", [{"method": None}, {"content_type": "x/y"}, {"path": "/no/rpc"}])
def test_calls_that_are_refused_without_end_stay_cheap(connect, direct, wrong):
    peer = connect()
    block = peer.encoder.encode(call_headers("ServerLive", **wrong))
    with others_served(direct), PeakMemory() as peak:
        for first in range(1, 60_001, 2000):
            all_sent = pour(peer, b"".join(frame(1, 5, stream, block) for stream in range(first, first + 2000, 2)), 1)
    assert peak.bytes < FEW
    was_borne_or_cut_off(peer, all_sent)


def test_who_never_reads_its_answers_gets_no_more_than_a_few(connect, direct):
    """Answers of 1 MiB each, for as long as the server takes calls."""
    peer = connect({SettingCodes.INITIAL_WINDOW_SIZE: LARGEST_WINDOW})
    peer.open_window(0, 1 << 30)
    block = peer.encoder.encode(call_headers("ModelInfer"))
    body = message(asked("wide", np.zeros((1, 1), "f4")).SerializeToString())
    before = ended(direct, "OK")
    with others_served(direct), PeakMemory() as peak:
        for stream in range(1, 2001, 2):
            pour(peer, frame(1, 4, stream, block) + frame(0, 1, stream, body), 1)
    assert ended(direct, "OK") - before < 200
    assert peak.bytes < 200 << 20
    peer.close()


def test_who_opens_no_window_for_a_stream_of_answers_gets_no_more_than_a_few(connect, direct):
    peer = connect({SettingCodes.INITIAL_WINDOW_SIZE: 0})
    peer.headers(1, call_headers("ModelStreamInfer"))
    one = message(asked("wide", np.zeros((1, 1), "f4")).SerializeToString())
    peer.socket.settimeout(1)
    with others_served(direct), PeakMemory() as peak:
        for _ in range(20):
            peer.send(frame(Kind.DATA, 0, 1, one * 50))
    assert peak.bytes < 3 * MESSAGE_LIMIT
    peer.reset(1)
    peer.socket.settimeout(10)
    peer.set({SettingCodes.INITIAL_WINDOW_SIZE: 65_535})
    assert_alive(peer, 3)


COSTLY = {
    "a byte for each": b"".join(frame(Kind.WINDOW_UPDATE, 0, stream, b"\0\0\0\1") for stream in range(1, 2001, 2)) * 9,
    "a byte for all": frame(Kind.WINDOW_UPDATE, 0, 0, b"\0\0\0\1") * 9000,
    "another window for all": settings_frame({SettingCodes.INITIAL_WINDOW_SIZE: 2}) * 9000,
    "windows for all, in one frame each": FLOODS["SETTINGS, full"] * 30,
}


@pytest.mark.parametrize("costly", COSTLY)
def test_many_calls_that_wait_for_their_windows_hold_up_nobody(connect, direct, costly):
    """Each change of a window could make the server look at all that wait."""
    peer = connect({SettingCodes.INITIAL_WINDOW_SIZE: 1})
    before = ended(direct, "OK")
    for stream in range(1, 2001, 2):
        peer.call(stream, "ModelInfer", floats(1))
    wait_until(direct, lambda: ended(direct, "OK") == before + 1000)
    with others_served(direct):
        was_borne_or_cut_off(peer, pour(peer, COSTLY[costly], 1))
    if not peer.closed:
        peer.set({SettingCodes.INITIAL_WINDOW_SIZE: 65_535})
        peer.open_window(0, 1 << 20)
        for stream in range(1, 2001, 2):
            assert peer.answer(stream).status == OK


def test_connections_that_only_begin_hold_up_nobody(connect, direct):
    for _ in range(100):
        connect(greet=False)
    for _ in range(100):
        connect()
    with others_served(direct):
        assert_alive(connect(), 1)
