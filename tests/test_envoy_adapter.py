"""Calls as Envoy hands them over: a caller of the test's own, who does not end a call by itself as gRPC's clients do."""

import asyncio
import gzip
from typing import Any

import grpc
import pytest
from starlette.applications import Starlette

from layercast.server.metrics import UNKNOWN, Metrics
from layercast.server.transport.dispatch import Handlers
from layercast.server.transport.envoy.adapter import Adapter
from layercast.server.transport.framing import framed

LIMIT = 1000


class Caller:
    """Sends the pieces of a body, then stays until `leave`; keeps what comes back."""

    def __init__(self, *pieces: bytes, ends: bool = True) -> None:
        self.events = [{"type": "http.request", "body": piece, "more_body": True} for piece in pieces]
        self.ends = ends
        if ends and self.events:
            self.events[-1]["more_body"] = False
        self.waiting: asyncio.Future[Any] | None = None
        self.gone = self.gone_after_status = False
        self.headers: dict[bytes, bytes] = {}
        self.body = b""

    def receive(self) -> "asyncio.Future[Any]":
        coming = asyncio.get_running_loop().create_future()
        if self.gone:
            coming.set_result({"type": "http.disconnect"})
        elif self.events:
            coming.set_result(self.events.pop(0))
        elif self.ends:
            coming.set_result({"type": "http.request", "body": b"", "more_body": False})
        else:
            self.waiting = coming
        return coming

    async def send(self, event: dict[str, Any]) -> None:
        self.headers |= dict(event.get("headers", ()))
        self.gone |= self.gone_after_status and b"grpc-status" in self.headers
        self.body += event.get("body", b"")

    def leave(self, error: Exception | None = None) -> None:
        self.gone = True
        if self.waiting and error:
            self.waiting.set_exception(error)
        elif self.waiting:
            self.waiting.set_result({"type": "http.disconnect"})

    @property
    def status(self) -> tuple[int, str]:
        return int(self.headers[b"grpc-status"]), self.headers.get(b"grpc-message", b"").decode()


class Rpcs:
    """Two RPCs: one answers with what it is sent, one never does."""

    def __init__(self) -> None:
        self.started = asyncio.Event()
        self.ended: list[str] = []
        self.metadata: Any = None
        self.metrics = Metrics()
        self.adapter = Adapter(Handlers((), self.metrics), LIMIT, Starlette())
        unary = {"Echo": self.echo, "Double": self.double, "Never": self.never}
        handlers = {name: grpc.unary_unary_rpc_method_handler(each) for name, each in unary.items()}
        handlers["Listen"] = grpc.stream_stream_rpc_method_handler(self.listen)
        self.adapter.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("s", handlers),))

    async def echo(self, raw: bytes, context: Any) -> bytes:
        self.metadata = context.invocation_metadata()
        return raw

    async def double(self, raw: bytes, context: Any) -> bytes:
        return raw + raw

    async def never(self, raw: bytes, context: Any) -> bytes:
        self.started.set()
        try:
            await asyncio.sleep(60)
        finally:
            self.ended.append("never")
        return b""

    async def listen(self, messages: Any, context: Any) -> None:
        try:
            async for message in messages:
                await context.write(message)
                self.started.set()
        finally:
            self.ended.append("listen")

    def ended_early(self) -> dict[int, float]:
        """How many calls of Echo were counted, by status, since they never came to their handler."""
        counts = {
            code: self.metrics.rpc_handled.labels("unary", "s", "Echo", code.name).value for code in grpc.StatusCode
        }
        return {code.value[0]: many for code, many in counts.items() if many}

    async def call(self, caller: Caller, name: str = "Echo", *headers: tuple[bytes, bytes]) -> Caller:
        given = [(b"content-type", b"application/grpc"), (b"te", b"trailers"), *headers]
        scope = {
            "type": "http", "http_version": "2", "path": f"/s/{name}", "headers": given, "client": ("127.0.0.1", 1),
        }  # fmt: skip
        await asyncio.wait_for(self.adapter(scope, caller.receive, caller.send), 10)
        return caller


@pytest.fixture
def rpcs() -> Rpcs:
    return Rpcs()


async def test_a_message_is_answered_however_it_comes(rpcs):
    whole = framed(b"abc")
    for pieces in ((whole,), (whole[:3], whole[3:]), (whole, b"")):
        caller = await rpcs.call(Caller(*pieces))
        assert (caller.status, caller.body) == ((0, ""), whole)


@pytest.mark.parametrize(
    ("pieces", "code", "text"),
    [
        ((b"",), 3, "ended before its message"),
        ((framed(b"a") + framed(b"b"),), 3, "more than one message"),
        ((framed(b"abc")[:-1],), 3, "in the middle of a message"),
        ((b"\7\0\0\0\0",), 3, "begins with 7"),
        ((framed(bytes(LIMIT + 1)),), 8, "1,001 bytes, the limit is 1,000"),
        ((b"\1" + framed(b"abc")[1:],), 12, "grpc-encoding does not say"),
    ],
)
async def test_what_is_no_message_gets_a_status(rpcs, pieces, code, text):
    caller = await rpcs.call(Caller(*pieces))
    assert caller.status[0] == code
    assert text in caller.status[1]
    assert rpcs.ended_early() == {code: 1}


async def test_a_caller_who_leaves_before_its_message_is_whole_is_counted(rpcs):
    caller = Caller(framed(b"abc")[:-1], ends=False)
    running = asyncio.create_task(rpcs.call(caller))
    while not caller.waiting:
        await asyncio.sleep(0)
    caller.leave()
    await running
    assert rpcs.ended_early() == {1: 1}


async def test_a_deadline_before_the_message_is_whole_is_counted(rpcs):
    caller = await rpcs.call(Caller(framed(b"abc")[:-1], ends=False), "Echo", (b"grpc-timeout", b"20m"))
    assert caller.status == (4, "the deadline passed")
    assert rpcs.ended_early() == {4: 1}


async def test_an_rpc_that_is_not_there_is_counted_as_unknown(rpcs):
    caller = await rpcs.call(Caller(framed(b"a")), "Other")
    assert caller.status[0] == 12
    assert rpcs.metrics.rpc_handled.labels("unary", UNKNOWN, UNKNOWN, "UNIMPLEMENTED").value == 1


async def test_a_compressed_message_counts_as_what_comes_out(rpcs):
    for size, code in ((LIMIT, 0), (LIMIT + 1, 8)):
        caller = await rpcs.call(
            Caller(b"\1" + framed(gzip.compress(bytes(size)))[1:]), "Echo", (b"grpc-encoding", b"gzip")
        )
        assert caller.status[0] == code
        assert caller.body == (framed(bytes(size)) if code == 0 else b"")


async def test_an_answer_over_the_limit_is_refused(rpcs):
    caller = await rpcs.call(Caller(framed(bytes(LIMIT))), "Double")
    assert (caller.status[0], caller.body) == (8, b"")


async def test_metadata_comes_as_grpc_gives_it(rpcs):
    await rpcs.call(Caller(framed(b"")), "Echo", (b"x-bin", b"/wA"), (b"x", b"1"), (b"grpc-timeout", b"1S"))
    assert rpcs.metadata == (("x-bin", b"\xff\0"), ("x", "1"))


@pytest.mark.parametrize("name", ["Never", "Listen"])
async def test_the_server_ends_a_call_whose_deadline_has_passed(rpcs, name):
    caller = await rpcs.call(Caller(framed(b"a"), ends=name == "Never"), name, (b"grpc-timeout", b"50m"))
    assert caller.status == (4, "the deadline passed")
    assert rpcs.ended == [name.lower()]


async def test_a_timeout_that_is_none_is_refused(rpcs):
    caller = await rpcs.call(Caller(framed(b"a")), "Echo", (b"grpc-timeout", b"soon"))
    assert caller.status[0] == 3
    assert "header grpc-timeout is 'soon'" in caller.status[1]


@pytest.mark.parametrize("name", ["Never", "Listen"])
async def test_a_call_ends_when_its_caller_leaves(rpcs, name):
    caller = Caller(framed(b"a"), ends=name == "Never")
    running = asyncio.create_task(rpcs.call(caller, name))
    await rpcs.started.wait()
    assert not rpcs.ended
    caller.leave()
    await running
    assert rpcs.ended == [name.lower()]
    assert b"grpc-status" not in caller.headers


async def test_a_call_ends_when_its_body_breaks_off(rpcs):
    caller = Caller(framed(b"a"), ends=False)
    running = asyncio.create_task(rpcs.call(caller, "Listen"))
    await rpcs.started.wait()
    caller.leave(OSError("reset"))
    await running
    assert rpcs.ended == ["listen"]


async def test_a_stop_refuses_new_calls_and_cuts_off_those_that_last_too_long(rpcs):
    caller = Caller(framed(b"a"))
    running = asyncio.create_task(rpcs.call(caller, "Never"))
    await rpcs.started.wait()
    stopping = asyncio.create_task(rpcs.adapter.stop(0.1))
    await asyncio.sleep(0)  # it refuses at once
    late = Caller(framed(b"a"))
    late.gone_after_status = True
    await rpcs.call(late)
    assert late.status == (14, "the server is shutting down")
    caller.gone_after_status = True
    await stopping
    await running
    assert caller.status == (14, "the server is shutting down")
