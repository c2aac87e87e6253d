"""The front end `direct`: clients that send without end, or never read, cost bounded memory and hold up nobody."""

import contextlib
import struct
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Literal

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
from test_direct_hpack import CALL as CALL_BLOCK
from test_direct_hpack import KEPT, indexed, literal
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


Outcome = Literal["sent", "stuck", "closed"]


def pour(peer: Peer, chunks: Iterable[bytes]) -> Outcome:
    """Send without reading, until the server has closed, or takes no more, or all is sent."""
    peer.socket.settimeout(1)
    try:
        for chunk in chunks:
            peer.send(chunk)
    except ConnectionError:
        return "closed"
    except TimeoutError:
        return "stuck"
    finally:
        peer.socket.settimeout(20)
    return "sent"


def calls_of(call: Callable[[int], bytes], many: int, at_once: int = 1000) -> Iterator[bytes]:
    """Yield what makes so many calls, which `call` writes, each on a stream of its own."""
    for first in range(0, many, at_once):
        yield b"".join(call(2 * number + 1) for number in range(first, first + at_once))


def was_cut_off(peer: Peer, outcome: Outcome) -> None:
    """The server has ended the connection and says for what, or reads no more before we do."""
    if outcome != "stuck":
        # None: what we had still sent cut its words off.
        assert peer.ends() in (ErrorCodes.ENHANCE_YOUR_CALM, None)


def was_borne_or_cut_off(peer: Peer, outcome: Outcome) -> None:
    """The same, or it has read all of it and goes on."""
    if outcome == "sent":
        with contextlib.suppress(ConnectionError):
            peer.frame(Kind.PING, payload=b"all read")
        while peer.read() is not None and peer.frames[-1].payload != b"all read":
            pass
        if not peer.closed:
            return
    was_cut_off(peer, outcome)


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
        outcome = pour(peer, [chunk] * 300)
    assert peak.bytes < FEW
    was_borne_or_cut_off(peer, outcome)


def test_a_flood_of_empty_continuations_is_cut_off(connect, direct):
    peer = connect()
    peer.headers(1, CALL, flags=0)
    with others_served(direct), PeakMemory() as peak:
        outcome = pour(peer, [frame(Kind.CONTINUATION, 0, 1, b"") * 4000] * 300)
    assert peak.bytes < FEW
    was_cut_off(peer, outcome)


@pytest.mark.parametrize("name", ["ServerLive", "ModelInfer", "ModelStreamInfer", "/no/rpc"])
def test_calls_that_are_reset_as_they_open_are_cut_off(connect, direct, name):
    """Rapid reset (CVE-2023-44487)."""
    peer = connect()
    block = peer.encoder.encode(call_headers(name))

    def reset(stream: int) -> bytes:
        return frame(Kind.HEADERS, END_HEADERS, stream, block) + frame(Kind.RST_STREAM, 0, stream, b"\0\0\0\x08")

    with others_served(direct), PeakMemory() as peak:
        outcome = pour(peer, calls_of(reset, 50_000))
    assert peak.bytes < FEW
    was_cut_off(peer, outcome)


def test_calls_that_the_server_is_made_to_reset_are_cut_off_too(connect, direct):
    """MadeYouReset (CVE-2025-8671): a window that opens by nothing makes the server end the call itself."""
    peer = connect()
    block = peer.encoder.encode(call_headers("ModelInfer"))
    body = message(floats(1).SerializeToString())

    def wrong(stream: int) -> bytes:
        begun = frame(Kind.HEADERS, END_HEADERS, stream, block) + frame(Kind.DATA, 1, stream, body)
        return begun + frame(Kind.WINDOW_UPDATE, 0, stream, bytes(4))

    with held(direct) as batcher, others_served(direct), PeakMemory() as peak:
        outcome = pour(peer, calls_of(wrong, 50_000))
        was_cut_off(peer, outcome)
        wait_until(direct, lambda: batcher.queued_rows == 0)
    assert peak.bytes < FEW


@pytest.mark.parametrize("wrong", [{"method": None}, {"content_type": "x/y"}, {"path": "/no/rpc"}])
def test_calls_that_are_refused_without_end_stay_cheap(connect, direct, wrong):
    peer = connect()
    block = peer.encoder.encode(call_headers("ServerLive", **wrong))
    with others_served(direct), PeakMemory() as peak:
        outcome = pour(peer, calls_of(lambda stream: frame(Kind.HEADERS, 5, stream, block), 30_000))
    assert peak.bytes < FEW
    was_borne_or_cut_off(peer, outcome)


def test_who_does_not_read_its_answers_is_not_read_either(connect, direct):
    """Answers of 1 MiB each, while what waits for the caller is within bounds; the rest when it reads again."""
    peer = connect({SettingCodes.INITIAL_WINDOW_SIZE: LARGEST_WINDOW})
    peer.open_window(0, 1 << 30)
    before, sent = ended(direct, "OK"), 0
    port = peer.socket.getsockname()[1]
    (connection,) = (each for each in direct.server.front_end._connections if each.peer.endswith(f":{port}"))
    with others_served(direct), PeakMemory() as peak:
        while not connection._sending.paused:
            peer.call(2 * sent + 1, "ModelInfer", floats(1, "wide"))
            sent += 1
            wait_until(direct, lambda sent=sent: connection._sending.paused or ended(direct, "OK") == before + sent)
            assert sent < 100
        for more in range(20):
            peer.call(2 * (sent + more) + 1, "ModelInfer", floats(1, "wide"))
    assert peak.bytes < 100 << 20
    assert ended(direct, "OK") <= before + sent
    for stream in range(1, 2 * (sent + 20), 2):
        assert peer.answer(stream).status == OK


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


@pytest.mark.parametrize("many", [700, 3700])
def test_headers_of_very_many_fields_are_cut_off(connect, direct, many):
    """A byte for each, which costs its reader as much as a long one; and no two blocks are the same."""
    peer = connect()

    def long(stream: int) -> bytes:
        fields = literal("x", "1", KEPT) if stream == 1 else literal("y", str(stream)) + indexed(62) * many
        return frame(Kind.HEADERS, 5, stream, CALL_BLOCK + fields)

    with others_served(direct):
        outcome = pour(peer, calls_of(long, 2000, at_once=50))
        was_cut_off(peer, outcome)


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
        was_borne_or_cut_off(peer, pour(peer, [COSTLY[costly]]))
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
