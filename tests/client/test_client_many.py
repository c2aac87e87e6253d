"""predict_many of both clients: order, laziness, errors of one item and of the stream, leaving early."""

import asyncio
import itertools
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing
from typing import Any

import numpy as np
import pytest
from numeric import Model, asked, identity, numeric
from test_server_inference import wait_until

import layercast.client as lc
from layercast.proto.messages import ModelInferRequest, ModelMetadataRequest, ServerLiveRequest

Connect = Callable[..., Any]
NAN = float("nan")


class Counting:
    """An iterable that knows how much of it was taken."""

    def __init__(self, items: Any) -> None:
        self._items = iter(items)
        self.taken = 0

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        item = next(self._items)
        self.taken += 1
        return item


def rows(count: int) -> list[list[list[float]]]:
    return [[[float(number)]] for number in range(count)]


def batcher(served: Any) -> Any:
    return served.server.repository.models["same", 1].batcher


# --------------------------------------------------------------------------------------------------------- results


def test_results_come_in_order_and_are_what_predict_returns(client: Any, server: Any) -> None:
    results = list(client.predict_many("echo_FP32", rows(300), version="2"))
    assert [result.item() for result in results] == list(range(300))
    assert {result.shape for result in results} == {(1, 1)}
    sent = server.asked(ModelInferRequest)
    assert len(sent) == 300
    assert {request.model_version for request in sent} == {"2"}
    assert server.drained == 1
    assert len(server.asked(ModelMetadataRequest)) == 1


def test_batches_dicts_and_outputs(client: Any) -> None:
    items = [{"a": np.full((n, 2), n), "b": np.ones((n, 2), "i4")} for n in (1, 3)]
    first, second = client.predict_many("pair", items)
    assert (first["sum"].tolist(), second["difference"].shape) == ([[2, 2]], (3, 2))
    assert [each.tolist() for each in client.predict_many("pair", items[:1], outputs="difference")] == [[[0, 0]]]
    assert [list(each) for each in client.predict_many("pair", items[:1], outputs=["sum"])] == [["sum"]]


def test_no_items_no_results(client: Any) -> None:
    assert list(client.predict_many("echo_FP32", [])) == []
    assert list(client.predict_many("echo_FP32", iter(()), errors="return")) == []


def test_an_endless_iterable_is_taken_no_further_than_the_bound(client: Any, server: Any) -> None:
    items = Counting([[float(number)]] for number in itertools.count())
    results = client.predict_many("echo_FP32", items, in_flight=5)
    assert items.taken == 0
    for number in range(20):
        assert next(results).item() == number
        assert number < items.taken <= number + 6
    results.close()
    assert items.taken <= 25


def test_with_one_in_flight_an_item_may_depend_on_the_result_before(client: Any) -> None:
    latest = [1.0]

    def items() -> Iterator[Any]:
        for _ in range(6):
            yield [[latest[0] * 2]]

    for result in client.predict_many("echo_FP32", items(), in_flight=1):
        latest[0] = result.item()
    assert latest == [64.0]


def test_large_items_are_bounded_by_their_size(connect: Connect) -> None:
    """Two of 0.6 MB are over the client's 1 MiB, so the third waits for the first answer."""
    with numeric({"same": Model(identity)}) as served:
        client = connect(served.url, max_message_bytes=1 << 20)
        items = Counting(np.full((1, 150_000), number, "f4") for number in range(6))
        for number, result in enumerate(client.predict_many("same", items)):
            assert result[0, 0] == number
            assert items.taken <= number + 3


# ----------------------------------------------------------------------------------------------------------- errors


def test_a_failed_item_raises_and_says_which(client: Any) -> None:
    results = client.predict_many("echo_FP32", [[[0.0]], [[1.0]], [[NAN]], [[3.0]]])
    assert [next(results).item(), next(results).item()] == [0, 1]
    with pytest.raises(lc.InvalidArgument, match="item 2: input 'x': NaN") as caught:
        next(results)
    assert caught.value.answered == 2
    assert list(results) == []


def test_returned_errors_stand_in_their_items_place(connect: Connect, server: Any) -> None:
    """One refused by the server, one that can't be encoded, one too large to send."""
    client = connect(server.url, max_message_bytes=1 << 20)
    items = [[[0.0]], [[NAN]], [["text"]], np.zeros((1, 300_000), "f4"), [[4.0]]]
    first, refused, text, large, last = client.predict_many("echo_FP32", items, errors="return")
    assert (first.item(), last.item()) == (0, 4)
    assert isinstance(refused, lc.InvalidArgument)
    assert isinstance(text, lc.InvalidArgument)
    assert "pass numbers" in str(text)
    assert isinstance(large, lc.ResourceExhausted)
    assert [refused.answered, text.answered, large.answered] == [1, 2, 3]
    assert len(server.asked(ModelInferRequest)) == 3
    client.predict("echo_FP32", [[0.0]])
    assert len(server.asked(ModelMetadataRequest)) == 2, "a refusal forgets the metadata"


def test_an_iterable_that_fails_does_so_after_the_results_before_it(client: Any, server: Any) -> None:
    def items() -> Iterator[Any]:
        yield from rows(2)
        raise KeyError("no third")

    results = client.predict_many("echo_FP32", items())
    assert [next(results).item(), next(results).item()] == [0, 1]
    with pytest.raises(KeyError, match="no third"):
        next(results)


@pytest.mark.parametrize("errors", ["raise", "return"])
@pytest.mark.parametrize(
    ("after", "error", "text"),
    [
        (
            "breaks",
            lc.Unavailable,
            "after 4 answers, with .* in flight: the server (is shutting down|ended it; gRPC does not say why)",
        ),
        (
            "ends",
            (lc.InternalError, lc.Unavailable),
            "after 4 answers, with .* in flight: the server ended it(; gRPC does not say why| without an error)",
        ),
        ("misnumbers", lc.InternalError, "after 4 answers, .*: the server answered request '17' where 4 was due"),
    ],
)
def test_a_broken_stream_says_how_far_it_came(
    client: Any, server: Any, after: str, error: Any, text: str, errors: str
) -> None:
    server.after = after
    results = client.predict_many("echo_FP32", rows(9), errors=errors)
    assert [next(results).item() for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(error, match=text) as caught:
        next(results)
    assert caught.value.answered == 4
    assert len(server.asked(ModelInferRequest)) <= 9, "nothing is sent twice"


def test_a_server_that_shuts_down_answers_what_it_has_read_then_breaks_the_stream(connect: Connect) -> None:
    with numeric({"same": Model(identity)}) as served:
        results = connect(served.url).predict_many("same", ([[float(n)]] for n in itertools.count()), in_flight=4)
        got = [next(results).item()]
        stopping = threading.Thread(target=served.wait, args=(served.server.front_end.stop(20),))
        stopping.start()
        with pytest.raises(lc.Unavailable, match="shutting down|does not say why") as caught:
            got.extend(result.item() for result in results)
        assert got == list(range(len(got)))
        assert caught.value.answered == len(got)
        stopping.join(20)
        assert not stopping.is_alive()


def test_a_missing_answer_is_late_and_the_rest_withdrawn(connect: Connect) -> None:
    with numeric({"same": Model(identity)}) as served:
        client = connect(served.url)
        served.on_loop(batcher(served).hold)
        with pytest.raises(lc.DeadlineExceeded, match=r"after 0 answers, .* within 0.3 s") as caught:
            list(client.predict_many("same", rows(3), timeout=0.3))
        assert isinstance(caught.value, TimeoutError)
        wait_until(served, lambda: batcher(served).queued_rows == 0)
        served.on_loop(batcher(served).release)
        assert len(list(client.predict_many("same", rows(3), timeout=30))) == 3


def test_an_unknown_model_and_an_unreachable_server(client: Any, connect: Connect) -> None:
    with pytest.raises(lc.NotFound, match="unknown model"):
        list(client.predict_many("nothing", rows(1)))
    with pytest.raises(lc.Unavailable, match="no server answers"):
        list(connect("localhost:1").predict_many("echo_FP32", rows(1)))


def test_arguments_that_make_no_sense_are_refused_at_once(client: Any) -> None:
    with pytest.raises(ValueError, match="items is one dict"):
        client.predict_many("pair", {"a": [[0, 0]], "b": [[0, 0]]})
    with pytest.raises(ValueError, match="errors is 'ignore'"):
        client.predict_many("pair", [], errors="ignore")
    with pytest.raises(ValueError, match="in_flight is 0"):
        client.predict_many("pair", [], in_flight=0)


def test_a_client_that_is_closed_meanwhile(client: Any) -> None:
    results = client.predict_many("echo_FP32", ([[1.0]] for _ in itertools.count()))
    next(results)
    client.close()
    with pytest.raises(lc.Cancelled, match="the stream ended after"):
        for _ in results:
            pass
    with pytest.raises(lc.LayercastError, match="this client is closed"):
        list(client.predict_many("echo_FP32", rows(1)))


# ---------------------------------------------------------------------------------------------------- leaving early


def test_leaving_early_closes_the_stream_and_withdraws_what_waits(connect: Connect) -> None:
    with numeric({"same": Model(identity)}) as served:
        results = connect(served.url).predict_many("same", ([[float(n)]] for n in itertools.count()), in_flight=20)
        assert next(results).item() == 0
        served.on_loop(batcher(served).hold)
        open_streams = served.server.front_end._streams[0]._open
        assert served.on_loop(lambda: len(open_streams)) == 1
        results.close()
        wait_until(served, lambda: not open_streams)
        wait_until(served, lambda: batcher(served).queued_rows == 0)
        served.on_loop(batcher(served).release)
        assert served.call("ServerLive", ServerLiveRequest()).live
        assert served.call("ModelInfer", asked("same", np.ones((1, 1), "f4"))).outputs


def test_a_loop_that_is_left_needs_no_close(server: Any) -> None:
    before = threading.active_count()
    with lc.Client(server.url) as client:
        for result in client.predict_many("echo_FP32", ([[1.0]] for _ in itertools.count())):
            assert result.item() == 1
            break
        assert client.is_live()
    for thread in threading.enumerate():
        if thread.name == "layercast-answers":
            thread.join(10)
            assert not thread.is_alive()
    assert threading.active_count() <= before + 2


def test_ctrl_c_ends_the_wait_and_withdraws_what_waits() -> None:
    program = (
        "import signal, sys, layercast.client as lc\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "client = lc.Client(sys.argv[1], timeout=None)\n"
        "list(client.predict_many('same', [[[1.0]]] * 3))\n"
    )
    with numeric({"same": Model(identity)}) as served:
        served.on_loop(batcher(served).hold)
        command = [sys.executable, "-c", program, served.url]
        with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
            wait_until(served, lambda: batcher(served).queued_rows == 3)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=20)
        assert err.rstrip().endswith(b"KeyboardInterrupt")
        wait_until(served, lambda: batcher(served).queued_rows == 0)


def test_asynchronous_items_and_a_cancelled_task(server: Any) -> None:
    async def numbers() -> AsyncIterator[Any]:
        for row in rows(40):
            await asyncio.sleep(0)
            yield row

    async def main() -> list[float]:
        async with lc.AsyncClient(server.url) as client:
            got = [result.item() async for result in client.predict_many("echo_FP32", numbers())]
            stuck = client.predict_many("slow", ([1.0] for _ in range(3)), timeout=None)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(anext(stuck), 0.2)
            async with aclosing(client.predict_many("echo_FP32", numbers())) as results:
                async for result in results:
                    got.append(result.item())
                    break
            async with asyncio.timeout(10):
                while len(asyncio.all_tasks()) > 1:  # gRPC's end in their own time
                    await asyncio.sleep(0)
        return got

    assert asyncio.run(main()) == [*range(40), 0]


def test_streams_of_one_client_run_beside_each_other(server: Any) -> None:
    with lc.Client(server.url) as client:
        first = client.predict_many("echo_INT64", ([[n]] for n in range(50)))
        second = client.predict_many("echo_INT64", ([[1000 + n]] for n in range(50)))
        assert [(a.item(), b.item()) for a, b in zip(first, second, strict=True)] == [(n, 1000 + n) for n in range(50)]


# --------------------------------------------------------------------------------------------------------- warnings


def test_the_servers_doubts_are_warnings_at_the_callers_line(client: Any) -> None:
    with pytest.warns(lc.InputWarning, match="want values from 0 to 1, got 0 to 7") as caught:
        assert client.predict("doubtful", [7.0]).tolist() == [0]
    with pytest.warns(lc.InputWarning) as more:
        assert len(list(client.predict_many("doubtful", [[7.0], [7.0]]))) == 2
    assert len(more) == 2
    assert not any("layercast" in each.filename.rsplit("/", 2)[-2] for each in [*caught, *more])
