"""The front end `direct`: answers go out as the client's windows and settings allow, and not a byte more."""

import pytest
from direct import (
    OK,
    UNIMPLEMENTED,
    assert_alive,
    assert_connection_error,
    assert_echoed,
    assert_stream_error,
    ended,
    floats,
)
from h2.errors import ErrorCodes
from h2.settings import SettingCodes
from h2_frames import LARGEST_WINDOW, Kind, call_headers, message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_server_inference import wait_until

WINDOW = SettingCodes.INITIAL_WINDOW_SIZE


def answered(direct, peer, *streams, count: int) -> None:
    """Call `same` on the streams, and wait until all answers are made."""
    before = ended(direct, "OK")
    for stream in streams:
        peer.call(stream, "ModelInfer", floats(count))
    wait_until(direct, lambda: ended(direct, "OK") == before + len(streams))
    peer.ping()


def body(peer, *streams) -> int:
    return sum(len(peer.streams[stream].body) for stream in streams)


def reaches(peer, size: int, *streams) -> None:
    """So much comes, and no more."""
    peer.until(lambda: body(peer, *streams) >= size)
    peer.ping()
    assert body(peer, *streams) == size


def test_an_answer_comes_as_its_stream_is_opened(connect, direct):
    peer, opened = connect({WINDOW: 0}), 0
    answered(direct, peer, 1, count=10_000)
    assert body(peer, 1) == 0
    for by in (1, 4, 5, 100, 16_385):
        peer.open_window(1, by)
        opened += by
        reaches(peer, opened, 1)
    assert not peer.streams[1].ended
    peer.open_window(1, 1 << 20)
    assert_echoed(peer.answer(1), 10_000)


def test_all_answers_together_keep_to_the_window_of_the_connection(connect, direct):
    peer = connect({WINDOW: LARGEST_WINDOW})
    answered(direct, peer, 1, 3, count=20_000)
    reaches(peer, 65_535, 1, 3)
    peer.open_window(0, 10)
    reaches(peer, 65_545, 1, 3)
    peer.open_window(0, 1 << 20)
    for stream in (1, 3):
        assert_echoed(peer.answer(stream), 20_000)


def test_headers_and_trailers_need_no_window(connect, direct):
    peer = connect({WINDOW: 0})
    peer.call(1, "/no/rpc")
    assert peer.answer(1).status == UNIMPLEMENTED
    answered(direct, peer, 3, count=10)
    peer.open_window(3, 10_000)
    assert_echoed(peer.answer(3), 10)


def test_a_stream_that_waits_for_its_window_holds_up_no_other(connect, direct):
    peer = connect({WINDOW: 100})
    answered(direct, peer, 1, count=1000)
    assert_alive(peer, 3)
    assert body(peer, 1) == 100
    peer.open_window(1, 100_000)
    assert_echoed(peer.answer(1), 1000)


def test_a_stream_that_is_reset_while_it_waits_leaves_the_window_to_the_others(connect, direct):
    peer = connect({WINDOW: LARGEST_WINDOW})
    answered(direct, peer, 1, count=100_000)
    peer.until(lambda: body(peer, 1) >= 65_535)
    peer.call(3, "ModelInfer", floats(1000))
    peer.ping()
    assert body(peer, 3) == 0
    peer.reset(1)
    peer.open_window(0, 65_535)
    assert_echoed(peer.answer(3), 1000)
    assert body(peer, 1) == 65_535


def test_a_larger_initial_window_opens_streams_that_wait(connect, direct):
    peer = connect({WINDOW: 10})
    answered(direct, peer, 1, 3, count=1000)
    assert body(peer, 1) == body(peer, 3) == 10
    peer.set({WINDOW: 30})
    peer.until(lambda: body(peer, 1) >= 30 and body(peer, 3) >= 30)
    peer.ping()
    assert body(peer, 1) == body(peer, 3) == 30
    peer.set({WINDOW: 65_535})
    for stream in (1, 3):
        assert_echoed(peer.answer(stream), 1000)


def test_a_smaller_initial_window_may_leave_less_than_nothing(connect, direct):
    peer = connect({WINDOW: 1000})
    answered(direct, peer, 1, count=1000)
    assert body(peer, 1) == 1000
    peer.set({WINDOW: 100})
    peer.open_window(1, 900)
    peer.ping()
    assert body(peer, 1) == 1000
    peer.open_window(1, 1)
    reaches(peer, 1001, 1)
    answered(direct, peer, 3, count=1000)
    assert body(peer, 3) == 100
    peer.set({WINDOW: 65_535})
    for stream in (1, 3):
        assert_echoed(peer.answer(stream), 1000)


def test_the_last_setting_of_a_frame_counts(connect, direct):
    peer = connect({WINDOW: 0})
    answered(direct, peer, 1, count=1000)
    peer.frame(Kind.SETTINGS, payload=bytes.fromhex("00040000ffff000400000005"))
    peer.ping()
    peer.ping()
    # Between the two it was open, if only for a moment.
    assert body(peer, 1) >= 5
    answered(direct, peer, 3, count=1000)
    assert body(peer, 3) == 5
    peer.set({WINDOW: 65_535})
    for stream in (1, 3):
        assert_echoed(peer.answer(stream), 1000)


@pytest.mark.parametrize("largest", [16_384, 20_000, (1 << 24) - 1])
def test_no_frame_is_larger_than_the_client_takes(connect, largest):
    peer = connect({SettingCodes.MAX_FRAME_SIZE: largest, WINDOW: LARGEST_WINDOW})
    peer.open_window(0, 1 << 24)
    peer.call(1, "ModelInfer", floats(10, "wide"))
    assert peer.answer(1).status == OK
    assert body(peer, 1) > 1 << 20
    assert max(len(found.payload) for found in peer.frames) <= largest


def test_a_window_past_the_largest_is_an_error(connect, direct):
    peer = connect({WINDOW: LARGEST_WINDOW})
    answered(direct, peer, 1, count=100_000)
    reaches(peer, 65_535, 1)
    peer.open_window(1, 65_536)
    assert_stream_error(peer, 1, ErrorCodes.FLOW_CONTROL_ERROR)
    if not peer.goaway:
        peer.open_window(0, 1000)
        assert_alive(peer, 3)
    peer = connect()
    peer.open_window(0, LARGEST_WINDOW)
    assert_connection_error(peer, ErrorCodes.FLOW_CONTROL_ERROR)


def test_the_largest_windows_may_be_had_exactly(connect):
    peer = connect()
    peer.open_window(0, LARGEST_WINDOW - 65_535)
    peer.headers(1, call_headers("ServerLive"))
    peer.open_window(1, LARGEST_WINDOW - 65_535)
    peer.data(1, message(b""), end=True)
    assert peer.answer(1).status == OK
    assert_alive(peer, 3)


def test_a_setting_that_opens_a_stream_past_the_largest_window_ends_the_connection(connect, direct):
    peer = connect({WINDOW: 10})
    answered(direct, peer, 1, count=100_000)
    peer.open_window(1, LARGEST_WINDOW - 100_000)
    peer.set({WINDOW: 90_000})
    peer.frame(Kind.SETTINGS, payload=b"\0\4" + LARGEST_WINDOW.to_bytes(4, "big"))
    assert_connection_error(peer, ErrorCodes.FLOW_CONTROL_ERROR)


@pytest.mark.parametrize("payload", [bytes(4), bytes(3)])
def test_a_window_of_a_stream_that_opens_by_nothing_is_an_error(connect, direct, payload):
    peer = connect({WINDOW: 10})
    answered(direct, peer, 1, count=1000)
    peer.frame(Kind.WINDOW_UPDATE, 0, 1, payload)
    code = ErrorCodes.PROTOCOL_ERROR if len(payload) == 4 else ErrorCodes.FRAME_SIZE_ERROR
    assert_stream_error(peer, 1, code)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from([0, 1, 3]), st.integers(1, 3000)), max_size=20), st.integers(0, 2000))
def test_however_windows_are_opened_the_answers_are_the_same(direct, connect, opened, initial):
    peer = connect({WINDOW: initial})
    answered(direct, peer, 1, 3, count=2000)
    allowed = {0: 65_535, 1: initial, 3: initial}
    for stream, by in opened:
        peer.open_window(stream, by)
        allowed[stream] += by
        peer.ping()
        assert all(body(peer, each) <= allowed[each] for each in (1, 3))
    for stream in (1, 3):
        peer.open_window(stream, 100_000)
    for stream in (1, 3):
        assert_echoed(peer.answer(stream), 2000)
    peer.close()
