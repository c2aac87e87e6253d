"""The front end `direct`: whatever bytes come, in whatever pieces, it answers or closes, and serves the others."""

import asyncio
import random
import struct
from collections.abc import Callable, Iterator

import pytest
from direct import floats, held, idle, serving_directly, still_serves
from h2.errors import ErrorCodes
from h2.settings import SettingCodes
from h2_frames import END_HEADERS, PREFACE, Kind, call_headers, frame, message, settings_frame
from h2_peer import Peer
from hpack import Encoder
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from serving import Running
from test_server_inference import wait_until

QUICK = settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
BLOCKS = [Encoder().encode(call_headers(name)) for name in ("ServerLive", "ModelInfer", "ModelStreamInfer", "/no/rpc")]
BODIES = [message(b""), message(floats(3).SerializeToString()), message(b"\xff"), b"\0\0\0\0\5", b""]
NAMES = ("ServerLive", "ModelInfer", "ModelStreamInfer", "/no/rpc")


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    """A server that nothing but this module's bytes has spoken to."""
    with serving_directly() as server:
        yield server


streams = st.one_of(st.integers(0, 9), st.sampled_from([2**31 - 1, 2**32 - 1]))
payloads = st.one_of(
    st.sampled_from([*BLOCKS, *BODIES, bytes(4), b"\0\0\0\1", b"\x7f\xff\xff\xff", bytes(5), bytes(8)]),
    st.binary(max_size=40),
    st.builds(lambda key, value: struct.pack(">HI", key, value), st.integers(0, 8), st.integers(0, 2**32 - 1)),
)
any_frame = st.builds(
    frame, st.integers(0, 11), st.sampled_from([0, 1, 4, 5, 8, 9, 13, 32, 37, 45, 255]), streams, payloads,
    st.one_of(st.none(), st.none(), st.none(), st.integers(0, 20_000)),
)  # fmt: skip
a_call = st.builds(
    lambda stream, block, body, end: frame(Kind.HEADERS, END_HEADERS, stream, block) + frame(Kind.DATA, end, stream, body),
    st.sampled_from([1, 3, 5, 7, 9]), st.sampled_from(BLOCKS), st.sampled_from(BODIES), st.sampled_from([0, 1, 1]),
)  # fmt: skip
conversation = st.lists(st.one_of(any_frame, a_call, a_call), max_size=12).map(b"".join)


def ends_somehow(peer: Peer, data: bytes, cuts: list[int]) -> None:
    """Send the data in pieces, then leave: the server answers what it understood, or says what was wrong, and closes."""
    try:
        for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True):
            peer.send(data[start:end])
        peer.socket.shutdown(1)
    except OSError:
        pass  # it has closed already
    code = peer.ends()
    assert code is None or code is not ErrorCodes.INTERNAL_ERROR


def cuts_of(data: bytes, numbers: list[int]) -> list[int]:
    return sorted(number % (len(data) + 1) for number in numbers)


@QUICK
@given(data=conversation, numbers=st.lists(st.integers(0, 10_000), max_size=6))
def test_frames_of_any_kind_are_answered_or_refused(server, data, numbers):
    with Peer(server.server.grpc_port, greet=False) as peer:
        data = PREFACE + settings_frame({}) + data
        ends_somehow(peer, data, cuts_of(data, numbers))


@QUICK
@given(data=st.binary(max_size=200), greets=st.booleans())
def test_bytes_of_any_kind_are_refused(server, data, greets):
    assume(greets or b"HTTP/1" not in data)  # which is answered by text
    with Peer(server.server.grpc_port, greet=False) as peer:
        ends_somehow(peer, (PREFACE + settings_frame({}) if greets else b"") + data, [])


def mutated(data: bytes, rng: random.Random) -> bytes:
    """The bytes with a few of them changed, removed or doubled."""
    content = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(content))
        match rng.randrange(4):
            case 0:
                content[at] = rng.randrange(256)
            case 1:
                content[at] ^= 1 << rng.randrange(8)
            case 2:
                del content[at : at + rng.randint(1, 12)]
            case 3:
                content[at:at] = content[at : at + rng.randint(1, 12)]
    return bytes(content)


def whole_conversation() -> bytes:
    """All that a client may do, once."""
    encoder, parts = Encoder(), [settings_frame({SettingCodes.INITIAL_WINDOW_SIZE: 100}), settings_frame({}, 1)]
    for stream, name in zip(range(1, 9, 2), NAMES, strict=True):
        block = encoder.encode(call_headers(name, ("x-number", str(stream))))
        parts += [frame(Kind.HEADERS, 0, stream, block[:9]), frame(Kind.CONTINUATION, END_HEADERS, stream, block[9:])]
        body = message(floats(40).SerializeToString() if name.startswith("Model") else b"")
        parts += [frame(Kind.DATA, 0, stream, body[:7]), frame(Kind.DATA, 9, stream, b"\3" + body[7:] + bytes(3))]
        parts += [frame(Kind.WINDOW_UPDATE, 0, stream, struct.pack(">I", 10_000))]
    parts += [frame(Kind.PING, payload=b"12345678"), frame(Kind.PRIORITY, 0, 1, bytes(4) + b"\7")]
    parts += [frame(Kind.WINDOW_UPDATE, 0, 0, struct.pack(">I", 1 << 20)), frame(0x42, 7, 3, b"unknown")]
    parts += [settings_frame({SettingCodes.INITIAL_WINDOW_SIZE: 70_000})]
    return PREFACE + b"".join(parts)


def test_changed_bytes_of_a_right_conversation_are_answered_or_refused(server, caplog):
    right, rng, codes = whole_conversation(), random.Random(7), set()
    for _ in range(300):
        with Peer(server.server.grpc_port, greet=False) as peer:
            data = mutated(right, rng)
            ends_somehow(peer, data, cuts_of(data, [rng.randrange(10_000) for _ in range(rng.randrange(4))]))
            codes.add(peer.said())
    assert len(codes) >= 4  # the changes reached past the preface
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
    still_serves(server)


def replies(server: Running, pieces: Callable[[bytes], list[bytes]]) -> dict[int, object]:
    """What comes back for the right conversation, by stream; the numbers that time decides are left out."""
    with Peer(server.server.grpc_port, greet=False) as peer:
        for piece in pieces(whole_conversation()):
            peer.send(piece)
        found: dict[int, object] = {}
        for stream in range(1, 9, 2):
            reply = peer.answer(stream)
            # Told to send no more where the answer was there first.
            found[stream] = (reply.lists, [len(each) > 150 for each in reply.messages], reply.reset or None)
        peer.until(lambda: any(each[:2] == (Kind.PING, 1) for each in peer.frames))
        assert not peer.goaway
        return found


@pytest.fixture(scope="module")
def at_once(server) -> dict[int, object]:
    found = replies(server, lambda data: [data])
    statuses = [lists[-1]["grpc-status"] for lists, _, _ in found.values()]
    assert statuses == ["0", "0", "0", "12"]
    return found


@pytest.mark.parametrize("size", [1, 2, 3, 8, 9, 10, 24, 25, 100])
def test_pieces_of_one_size_say_the_same(server, at_once, size):
    assert replies(server, lambda data: [data[at : at + size] for at in range(0, len(data), size)]) == at_once


@settings(QUICK, max_examples=60)
@given(numbers=st.lists(st.integers(0, 10_000), max_size=30))
def test_pieces_of_any_sizes_say_the_same(server, at_once, numbers):
    def pieces(data: bytes) -> list[bytes]:
        cuts = cuts_of(data, numbers)
        return [data[start:end] for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True)]

    assert replies(server, pieces) == at_once


@settings(QUICK, max_examples=60)
@given(steps=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), max_size=40))
def test_calls_that_begin_end_and_are_given_up_in_any_order_leave_nothing(server, steps):
    """Begun, continued, ended or reset while the model is held, and the connection closed at the end."""
    before = server.on_loop(lambda: len(asyncio.all_tasks())) - 1
    with Peer(server.server.grpc_port) as peer, held(server):
        open_streams: list[int] = []
        body, last = message(floats(5).SerializeToString()), -1
        for what, which in steps:
            if what <= 1 or not open_streams:
                last += 2
                peer.headers(last, call_headers(NAMES[which]))
                open_streams.append(last)
                continue
            stream = open_streams[which % len(open_streams)]
            match what:
                case 2:
                    peer.data(stream, body, end=True)
                    open_streams.remove(stream)
                case 3:
                    peer.data(stream, body[:11])
                case 4:
                    peer.reset(stream)
                    open_streams.remove(stream)
                case 5:
                    peer.open_window(stream, 5)
        peer.ping()
    wait_until(server, lambda: all(idle(model) for model in server.server.repository.models.values()))
    wait_until(server, lambda: len(asyncio.all_tasks()) <= before + 1)  # and the one that looks
    assert not server.faults
