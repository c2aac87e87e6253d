"""The front end `direct`: how much of headers is taken, and that refusing them costs no more than the call."""

import pytest
from direct import EXHAUSTED, LIVE, OK, assert_alive
from h2.errors import ErrorCodes
from h2_frames import END_HEADERS, Kind, call_headers, frame, message
from test_direct_hpack import CALL, KEPT, indexed, literal
from test_wire import PeakMemory

REFUSALS = (ErrorCodes.ENHANCE_YOUR_CALM, ErrorCodes.PROTOCOL_ERROR, ErrorCodes.REFUSED_STREAM)


def assert_refused(peer, stream) -> None:
    """The call ends with a status or a reset; or the connection ends."""
    reply = peer.streams[stream]
    while not (reply.over or peer.goaway) and peer.read() is not None:
        pass
    if peer.goaway:
        assert peer.said() in REFUSALS
    elif reply.reset and not reply.lists:
        assert reply.reset in REFUSALS
    else:
        assert (reply.lists[0][":status"], reply.status) == ("200", EXHAUSTED)


def send_block(peer, stream: int, block: bytes) -> None:
    """Send a block as large as it may be, in as few frames as it takes."""
    pieces = [block[at : at + 16_384] for at in range(0, len(block), 16_384)]
    kinds = [Kind.HEADERS] + [Kind.CONTINUATION] * (len(pieces) - 1)
    for number, (kind, piece) in enumerate(zip(kinds, pieces, strict=True), 1):
        peer.frame(kind, END_HEADERS if number == len(pieces) else 0, stream, piece)


@pytest.mark.parametrize("size", [12 << 10, 15 << 10])
def test_headers_that_hold_a_long_token_pass(connect, size):
    peer = connect()
    for stream in (1, 3, 5):
        send_block(peer, stream, CALL + literal("authorization", "t" * size))
        peer.data(stream, message(b""), end=True)
        assert (peer.answer(stream).status, peer.answer(stream).messages) == (OK, [LIVE])


@pytest.mark.parametrize("kept", [False, True])
def test_headers_over_the_limit_are_refused_and_the_next_call_is_read_right(connect, kept):
    """The fields of a refused call go into the table like any others."""
    peer = connect()
    fields = [literal(f"x-{number}", "v" * 1000, KEPT if kept else 0) for number in range(40)]
    send_block(peer, 1, CALL + b"".join(fields) + literal("x-last", "1", KEPT))
    assert_refused(peer, 1)
    assert not peer.goaway
    peer.frame(Kind.HEADERS, END_HEADERS, 3, CALL + indexed(62))
    peer.data(3, message(b""), end=True)
    assert peer.answer(3).status == OK


def test_a_small_block_that_stands_for_large_headers_is_refused(connect):
    """A field of 4 KB in the table, and then one byte for each time it is meant."""
    peer = connect()
    peer.frame(Kind.HEADERS, END_HEADERS, 1, CALL + literal("x", "v" * 4000, KEPT))
    peer.data(1, message(b""), end=True)
    assert peer.answer(1).status == OK
    with PeakMemory() as peak:
        for stream in range(3, 43, 2):
            peer.frame(Kind.HEADERS, END_HEADERS, stream, CALL + indexed(62) * 16_000)
            assert_refused(peer, stream)
            if peer.goaway:
                break
    assert peak.bytes < 16 << 20
    if not peer.goaway:
        assert_alive(peer, 99)


@pytest.mark.parametrize("piece", [0, 1, 1000, 16_384])
def test_a_block_without_end_is_cut_off(connect, piece):
    peer = connect()
    block = (CALL + literal("x", "v" * 16_000))[:piece] if piece else b""
    more = frame(Kind.CONTINUATION, 0, 1, (literal("x", "v" * (piece - 10)) if piece > 10 else b"\0" * piece))
    chunk = more * max(1, 65_536 // len(more))
    refused = False
    with PeakMemory() as peak:
        peer.frame(Kind.HEADERS, 0, 1, block)
        try:
            for _ in range((8 << 20) // len(chunk)):
                peer.send(chunk)
        except ConnectionError:
            refused = True
    assert peak.bytes < 4 << 20
    if refused:
        assert peer.ends() in (*REFUSALS, ErrorCodes.COMPRESSION_ERROR, None)  # None: our own bytes cut its words off
    else:
        peer.socket.settimeout(20)
        assert peer.ends() in (*REFUSALS, ErrorCodes.COMPRESSION_ERROR, None)


def test_many_calls_with_headers_just_under_the_limit_are_all_served(connect):
    peer = connect()
    pairs = call_headers("ServerLive", *((f"x-{number}", str(number) * 300) for number in range(9)))
    for stream in range(1, 101, 2):
        peer.headers(stream, pairs)
        peer.data(stream, message(b""), end=True)
    for stream in range(1, 101, 2):
        assert peer.answer(stream).status == OK


def test_blocks_that_never_come_again_are_not_kept(connect):
    peer = connect()
    with PeakMemory() as peak:
        for number in range(400):
            send_block(peer, 2 * number + 1, CALL + literal("x", f"{number}" * 10_000))
            peer.data(2 * number + 1, message(b""), end=True)
            assert peer.answer(2 * number + 1).status == OK
    assert peak.bytes < 8 << 20
