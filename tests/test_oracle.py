"""A short run of the oracle against a server process, and controls: the oracle sees what it is there to see."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from oracle.journal import Asked, Journal, Reply
from oracle.soak import Load, gauges, soak
from oracle.subjects import Subject, subjects
from oracle.traffic import MISTAKES, WEIGHTS
from test_server_process import READY, serving


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Subject]]:
    root = tmp_path_factory.mktemp("oracle") / "repository"
    return root, subjects(root)


def test_nothing_is_lost_doubled_swapped_or_wrong_under_a_mixed_load(made):
    repository, known = made
    free = ("--grpc-port", "0", "--http-port", "0", "--metrics-port", "0")
    options = ("--engine", "eager", "--max-batch", "16", "--model-control", "explicit")
    with serving(repository, *free, *options) as server:
        grpc_port, _, metrics_port = server.read_until(READY).groups()
        load = Load(callers=12, requests=120, seconds=60, kills=2, reloads=4)
        journal = soak(f"127.0.0.1:{grpc_port}", known, load, repository)
        left = wait_for_quiet(f"http://127.0.0.1:{metrics_port}/metrics")
    assert journal.wrong() == []
    assert left == {"layercast_queue_rows": 0, "layercast_inflight_requests": 0}
    kinds = {key.split(" ")[0] for key in journal.counts()}
    assert kinds == {"predict", "features", "streamed", "hurried", "abandoned", "mistaken"}
    assert journal.counts()["predict OK"] > 500
    assert len(WEIGHTS) == len(kinds)


def wait_for_quiet(url: str) -> dict[str, float]:
    """Return the gauges once they are at zero, or as they are after ten seconds: killed clients leave a little late."""
    for _ in range(100):
        left = gauges(url, "layercast_queue_rows", "layercast_inflight_requests")
        if not any(left.values()):
            break
    return left


@pytest.fixture
def answered(made) -> tuple[Journal, Asked, Reply]:
    subject = made[1]["mnist"]
    asked = Asked("a", subject, [3, 5], ["logits"], "predict", frozenset({"OK"}))
    journal = Journal()
    journal.asks(asked)
    return journal, asked, Reply("OK", "a", 2, {"logits": subject.right(2, "logits", [3, 5])})


def test_the_oracle_accepts_a_right_answer(answered):
    journal, _, reply = answered
    journal.ended("a", reply)
    assert journal.wrong() == []


def test_the_oracle_sees_a_lost_request(answered):
    assert answered[0].wrong() == ["a (predict mnist): lost"]


def test_the_oracle_sees_two_answers_and_answers_to_nobody(answered):
    journal, _, reply = answered
    for id in ("a", "a", "b"):
        journal.ended(id, reply)
    assert journal.wrong() == ["b: an answer to a request that nobody made", "a (predict mnist): 2 ends"]


SPOILED = {
    "rows in another order": lambda reply: replace(reply, values={"logits": reply.values["logits"][::-1]}),
    "a mix of versions": lambda reply: replace(reply, version=1),
    "an unknown version": lambda reply: replace(reply, version=9),
    "another's id": lambda reply: replace(reply, id="b"),
    "a row too few": lambda reply: replace(reply, values={"logits": reply.values["logits"][:1]}),
    "another output": lambda reply: replace(reply, values={"layer:net.0": reply.values["logits"]}),
    "a value": lambda reply: replace(reply, values={"logits": reply.values["logits"] + np.float32(1e-2)}),
    "a status": lambda reply: replace(reply, status="INTERNAL"),
}


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED)
def test_the_oracle_sees(answered, spoil):
    journal, _, reply = answered
    journal.ended("a", spoil(reply))
    assert len(journal.wrong()) == 1


def test_every_mistake_is_made_by_name():
    assert {status for _, status in MISTAKES.values()} == {"NOT_FOUND", "INVALID_ARGUMENT"}
