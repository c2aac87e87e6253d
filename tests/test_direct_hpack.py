"""The front end `direct`: compressed header blocks (RFC 7541), whose meaning depends on those that came before."""

import copy
from collections.abc import Iterator
from types import SimpleNamespace

import grpc
import pytest
from direct import OK, assert_alive, assert_connection_error, peers_of, serving_directly
from h2.errors import ErrorCodes
from h2.settings import SettingCodes
from h2_frames import END_HEADERS, Kind, call_headers, message
from hpack import Decoder
from hpack.exceptions import HPACKError
from hpack.hpack import encode_integer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


def number(value: int, bits: int, first: int) -> bytes:
    made = encode_integer(value, bits)
    made[0] |= first
    return bytes(made)


def text(value: str) -> bytes:
    return number(len(value), 7, 0) + value.encode()


KEPT, UNKEPT, NEVER = 0x40, 0x00, 0x10


def literal(name: str, value: str, how: int = UNKEPT) -> bytes:
    """A field that goes into the table, or doesn't, or never may."""
    return bytes([how]) + text(name) + text(value)


def indexed(index: int) -> bytes:
    """A field of the table; the one that went into it last has 62."""
    return number(index, 7, 0x80)


def resized(size: int) -> bytes:
    return number(size, 5, 0x20)


CALL = b"".join(literal(*pair) for pair in call_headers("ServerLive"))


class Recorder(grpc.aio.ServerInterceptor):
    """Keeps what calls were sent with. Stands in for what guards a server."""

    certificates = tokens = None

    def __init__(self) -> None:
        self.seen: list[list[tuple[str, str]]] = []

    def interceptors(self, metrics):
        return (self,)

    async def intercept_service(self, continuation, details):
        self.seen.append([pair for pair in details.invocation_metadata if pair[0].startswith("x")])
        return await continuation(details)


@pytest.fixture(scope="module")
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture(scope="module")
def direct(recorder) -> Iterator:
    with serving_directly(security=recorder) as server:
        yield server


class Blocks:
    """Sends header blocks of calls, one call at a time, and returns what the server read in them."""

    def __init__(self, peer, recorder: Recorder) -> None:
        self.peer, self.recorder, self.stream = peer, recorder, -1

    def read(self, block: bytes) -> list[tuple[str, str]]:
        self.stream += 2
        self.peer.frame(Kind.HEADERS, END_HEADERS, self.stream, block)
        self.peer.data(self.stream, message(b""), end=True)
        assert self.peer.answer(self.stream).status == OK
        return self.recorder.seen[-1]


@pytest.fixture
def blocks(connect, recorder) -> Blocks:
    return Blocks(connect(), recorder)


BROKEN = {
    "index 0": b"\x80",
    "an index past the tables": indexed(62),
    "a name past the tables": number(70, 6, KEPT) + text("1"),
    "a text that is cut off": bytes([UNKEPT]) + b"\x05abc",
    "a number that is cut off": b"\xff",
    "a number without end": b"\xff" + b"\x80" * 500,
    "a number over all bounds": bytes([UNKEPT]) + b"\x7f\xff\xff\xff\xff\xff\xff\xff\xff\x7f",
    "Huffman's end of string": bytes([UNKEPT]) + b"\x84\xff\xff\xff\xff" + text("1"),
    "a table over what is allowed": None,
    "a table whose size comes late": literal("x", "1") + resized(100),
}


@pytest.mark.parametrize("place", ["first", "last"])
@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_block_ends_the_connection(connect, broken, place):
    peer = connect()
    wrong = BROKEN[broken] or resized(peer.settings.get(SettingCodes.HEADER_TABLE_SIZE, 4096) + 1)
    block = wrong + CALL if place == "first" else CALL + wrong
    if broken.endswith("cut off"):
        block = CALL + wrong
    peer.frame(Kind.HEADERS, END_HEADERS, 1, block)
    assert_connection_error(peer, ErrorCodes.COMPRESSION_ERROR)


def test_a_block_that_comes_again_puts_its_fields_into_the_table_again(blocks):
    kept = CALL + literal("x", "1", KEPT)
    for _ in range(3):
        assert blocks.read(kept) == [("x", "1")]
    assert blocks.read(CALL + literal("x", "2", KEPT)) == [("x", "2")]
    assert blocks.read(CALL + indexed(65)) == [("x", "1")]  # there are four, the first of them is deepest
    assert blocks.read(CALL + indexed(62)) == [("x", "2")]
    blocks.peer.frame(Kind.HEADERS, END_HEADERS, 99, CALL + indexed(66))
    assert_connection_error(blocks.peer, ErrorCodes.COMPRESSION_ERROR)


def test_the_same_bytes_mean_what_the_table_holds_by_then(blocks):
    last = CALL + indexed(62)
    for value in ("1", "2", "3"):
        blocks.read(CALL + literal("x", value, KEPT))
        assert blocks.read(last) == [("x", value)]
        assert blocks.read(last) == [("x", value)]


def test_a_name_of_the_table_may_change_too(blocks):
    last = CALL + number(62, 4, UNKEPT) + text("v")
    for name in ("xa", "xb", "xa"):
        blocks.read(CALL + literal(name, "1", KEPT))
        assert blocks.read(last) == [(name, "v")]


def test_a_field_may_leave_the_table_between_two_blocks_that_are_the_same(blocks):
    last = CALL + indexed(63)
    blocks.read(CALL + literal("x", "old", KEPT))
    blocks.read(CALL + literal("x", "new", KEPT))
    assert blocks.read(last) == [("x", "old")]
    blocks.read(CALL + literal("x", "l" * 4000, KEPT))  # leaves room for one more
    blocks.peer.frame(Kind.HEADERS, END_HEADERS, 99, CALL + indexed(64))
    assert_connection_error(blocks.peer, ErrorCodes.COMPRESSION_ERROR)


def test_the_table_may_be_emptied_and_made_large_again_at_the_start_of_a_block(blocks):
    blocks.read(CALL + literal("x", "1", KEPT))
    emptied = resized(0) + resized(4096) + CALL + literal("x", "2", KEPT)
    for _ in range(2):
        assert blocks.read(emptied) == [("x", "2")]
        assert blocks.read(CALL + indexed(62)) == [("x", "2")]
    blocks.peer.frame(Kind.HEADERS, END_HEADERS, 99, CALL + indexed(63))
    assert_connection_error(blocks.peer, ErrorCodes.COMPRESSION_ERROR)


def test_a_block_that_changes_the_size_of_an_empty_table_changes_it_each_time(blocks):
    small, large = resized(64) + CALL, resized(4096) + CALL
    for block in (large, small, large):
        blocks.read(block)
    blocks.read(CALL + literal("x", "l" * 100, KEPT))
    assert blocks.read(CALL + indexed(62)) == [("x", "l" * 100)]
    # What does not fit into the table now may fit into it later.
    kept = CALL + literal("x", "s" * 100, KEPT)
    blocks.read(small)
    blocks.read(kept)
    blocks.read(large)
    blocks.read(kept)
    assert blocks.read(CALL + indexed(62)) == [("x", "s" * 100)]
    blocks.read(small)
    blocks.read(kept)
    blocks.peer.frame(Kind.HEADERS, END_HEADERS, 99, CALL + indexed(62))
    assert_connection_error(blocks.peer, ErrorCodes.COMPRESSION_ERROR)


def test_a_field_larger_than_the_table_empties_it(blocks):
    blocks.read(CALL + literal("x", "1", KEPT))
    assert blocks.read(CALL + literal("x", "l" * 5000, KEPT)) == [("x", "l" * 5000)]
    blocks.peer.frame(Kind.HEADERS, END_HEADERS, 99, CALL + indexed(62))
    assert_connection_error(blocks.peer, ErrorCodes.COMPRESSION_ERROR)


def test_connections_share_no_table(connect, blocks, recorder):
    blocks.read(CALL + literal("x", "mine", KEPT))
    assert blocks.read(CALL + indexed(62)) == [("x", "mine")]
    other = Blocks(connect(), recorder)
    other.read(CALL + literal("x", "yours", KEPT))
    assert other.read(CALL + indexed(62)) == [("x", "yours")]
    assert blocks.read(CALL + indexed(62)) == [("x", "mine")]
    third = connect()
    third.frame(Kind.HEADERS, END_HEADERS, 1, CALL + indexed(62))
    assert_connection_error(third, ErrorCodes.COMPRESSION_ERROR)


@pytest.mark.parametrize("size", [0, 100, 4096])
def test_answers_keep_to_the_table_that_the_client_has(connect, size):
    """A client that allows a smaller one is told at the start of the next block that it is (RFC 7541, 4.2)."""
    peer = connect({SettingCodes.HEADER_TABLE_SIZE: size})
    peer.decoder = Decoder()
    peer.decoder.max_allowed_table_size = size
    for stream in (1, 3):
        assert_alive(peer, stream)
    peer.set({SettingCodes.HEADER_TABLE_SIZE: 50})
    peer.decoder.max_allowed_table_size = 50
    for stream in (5, 7):
        assert_alive(peer, stream)


FIELDS = st.tuples(st.sampled_from(["xa", "xb", "xc"]), st.sampled_from(["1", "2", "l" * 1500]))
PARTS = st.one_of(
    st.builds(lambda pair, how: literal(*pair, how), FIELDS, st.sampled_from([KEPT, KEPT, UNKEPT, NEVER])),
    st.integers(62, 67).map(indexed),
    st.builds(lambda index, value: number(index, 6, KEPT) + text(value), st.integers(62, 65), st.just("named")),
)
SIZES = st.sampled_from([b"", b"", b"", b"", resized(0), resized(0) + resized(4096), resized(64), resized(4096)])
BLOCK = st.builds(lambda size, parts: size + CALL + b"".join(parts), SIZES, st.lists(PARTS, max_size=3))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(made=st.lists(BLOCK, min_size=1, max_size=5), order=st.lists(st.integers(0, 4), max_size=25))
def test_any_blocks_in_any_order_mean_what_another_decoder_reads(direct, recorder, made, order):
    with peers_of(direct) as connect:
        blocks, other = Blocks(connect(), recorder), Decoder()
        for which in order:
            block = made[which % len(made)]
            trial = SimpleNamespace(decoder=copy.deepcopy(other))
            try:
                pairs = trial.decoder.decode(block)
            except HPACKError:
                continue  # this one would end the connection
            other = trial.decoder
            assert blocks.read(block) == [pair for pair in pairs if pair[0].startswith("x")]
