"""Which requests the short path takes, and that it answers them, bit for bit, as the general path does."""

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from begin import Subject, request
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numeric import Arrays
from test_short import steady

from layercast.models.manifest import LayerSpec, TensorSpec
from layercast.models.reducers import reduce
from layercast.proto.messages import ModelInferRequest, ModelInferResponse
from layercast.server.service import scopes
from layercast.server.service.heads import Heads
from layercast.server.work import Tap

INPUTS = (
    TensorSpec(name="image", datatype="FP32", shape=(-1, 2, 2), range=(0, 1)),
    TensorSpec(name="tokens", datatype="INT64", shape=(-1, -1), range=(0, 99), pad=0, max_length=5),
)
OUTPUTS = (
    TensorSpec(name="score", datatype="FP64", shape=(-1,)),
    TensorSpec(name="pair", datatype="INT32", shape=(-1, 2)),
)


def scored(inputs: Arrays) -> dict[str, np.ndarray]:
    """Each row's answer depends on all of the row, and padding changes nothing."""
    score = inputs["image"].astype("f8").sum((1, 2)) + inputs["tokens"].sum(1) / 7
    pair = np.stack([inputs["tokens"].max(1), (inputs["image"] > 0.5).sum((1, 2))], 1).astype("i4")
    return {"score": score, "pair": pair}


class Inner:
    """Gives two layers: a map of four numbers and one of as many as there are tokens."""

    name = "numpy"

    def tapped(self, inputs: Arrays, taps: Sequence[Tap], predict: bool) -> tuple[Arrays, dict[Tap, np.ndarray]]:
        layers = {"maps": inputs["image"][:, None] * 3, "tokens": inputs["tokens"][..., None].astype("f4")}
        features = {tap: reduce(torch.from_numpy(layers[tap.layer].copy()), tap.reducer).numpy() for tap in taps}
        return scored(inputs) if predict else {}, features


LAYERS = (
    LayerSpec(path="maps", type="Conv2d", shape=(-1, 1, 2, 2), datatype="FP32", order=0),
    LayerSpec(path="tokens", type="Embedding", shape=(-1, -1, 1), datatype="FP32", order=1),
)
MODEL: dict[str, Any] = {
    "function": scored, "inputs": INPUTS, "outputs": OUTPUTS, "layers": LAYERS, "taps": Inner(),
}  # fmt: skip
WANTED = (
    ("score",),
    ("pair", "score"),
    ("layer:maps@mean",),
    ("pair", "layer:maps", "layer:tokens@flatten", "score"),
    ("layer:*",),
    ("layer:tokens@fp16", "layer:tokens@max@norm"),
)


def asked(
    rows: int, length: int, identifier: str = "", version: str = "", seed: int = 0, outputs: Sequence[str] = ()
) -> ModelInferRequest:
    rng = np.random.default_rng(seed)
    image, tokens = rng.random((rows, 2, 2), "f4"), rng.integers(0, 100, (rows, length))
    message = ModelInferRequest(model_name="m", id=identifier, model_version=version)
    message.inputs.add(name="image", datatype="FP32", shape=image.shape)
    message.inputs.add(name="tokens", datatype="INT64", shape=tokens.shape)
    message.raw_input_contents.extend([image.tobytes(), tokens.astype("<i8").tobytes()])
    for name in outputs:
        message.outputs.add(name=name)
    return message


class Pair:
    """One model on both paths, in a loop of their own."""

    def __init__(self, **model: Any) -> None:
        self.loop = asyncio.new_event_loop()
        self.loop.run_until_complete(self._make(model))

    async def _make(self, model: dict[str, Any]) -> None:
        self.short, self.general = Subject(True, **model), Subject(False, **model)

    def ask(self, raw: bytes) -> tuple[Any, Any]:
        """Return how a message ends on the short path, None when that leaves it, and on the general one."""
        return self.loop.run_until_complete(self._ask(raw))

    async def _ask(self, raw: bytes) -> tuple[Any, Any]:
        before = self.short.counts()
        asked = self.short.ask(raw)
        if asked is None:
            assert self.short.counts() == before
        general = await self.general.ask(raw).ended()
        return asked and steady(await asked.ended()), steady(general)

    def close(self) -> None:
        self.loop.run_until_complete(self._close())
        self.loop.close()

    async def _close(self) -> None:
        await self.short.batcher.close()
        await self.general.batcher.close()


@pytest.fixture(scope="module")
def pair():
    made = Pair(**MODEL)
    yield made
    made.close()


@pytest.mark.parametrize("identifier", ["", "7", "8", "x" * 127, "x" * 128, "ünïcode"])
@pytest.mark.parametrize("version", ["", "1"])
def test_answers_are_equal_over_rows_lengths_and_ids(pair, identifier, version):
    for rows in (1, 2, 5, 8):
        for length in (1, 3, 5):
            for seed in (0, 1):
                short, general = pair.ask(asked(rows, length, identifier, version, seed).SerializeToString())
                assert isinstance(short, ModelInferResponse)
                assert short == general
                assert short.id == identifier


@pytest.mark.parametrize("outputs", WANTED, ids=str)
def test_layers_and_some_of_the_outputs_are_answered_as_when_the_request_is_read_in_full(pair, outputs):
    for rows, length in ((1, 3), (8, 5), (2, 1)):
        message = asked(rows, length, "7", outputs=outputs)
        short, general = pair.ask(message.SerializeToString())
        assert isinstance(short, ModelInferResponse)
        assert pair.ask(message.SerializeToString())[0] == short == general
        # A parameter, if only one that changes nothing, takes a request off every shortcut.
        message.parameters["priority"].int64_param = 0
        whole = pair.ask(message.SerializeToString())
        assert whole == (None, short)
        assert len(short.outputs) == len(short.raw_output_contents) >= len(outputs)


def test_requests_with_layers_are_counted_alike_on_both_paths():
    pair = Pair(**MODEL)
    pair.ask(asked(2, 3, outputs=WANTED[3]).SerializeToString())
    counts = pair.short.counts()
    assert counts["layercast_feature_taps_total", (("model", "m"), ("version", "1"))] == 2
    assert counts["layercast_feature_bytes_total", (("model", "m"), ("version", "1"))] == 2 * (16 + 12)
    assert counts == pair.general.counts()
    pair.close()


@pytest.mark.parametrize(
    "outputs", [("layer:nothing",), ("other",), ("score", "score"), ("layer:maps@no",), ("layer:maps@cls",)], ids=str
)
def test_names_that_the_model_does_not_have_or_that_do_not_fit_are_left_to_the_general_path(pair, outputs):
    message = asked(1, 1, outputs=outputs).SerializeToString()
    for _ in range(2):
        short, (code, text, *_) = pair.ask(message)
        assert short is None
        assert code.name == "INVALID_ARGUMENT"
        assert text


def test_layers_take_the_scope_of_features(pair):
    message = asked(1, 1, outputs=("score", "layer:maps")).SerializeToString()
    assert pair.ask(message)[0]
    scopes.grant((scopes.PREDICT,))
    try:
        short, (code, *_) = pair.ask(message)
    finally:
        scopes.grant(None)
    assert short is None
    assert code.name == "PERMISSION_DENIED"


def test_more_rows_than_the_largest_batch_are_left_to_the_general_path(pair):
    short, general = pair.ask(asked(9, 2).SerializeToString())
    assert short is None
    assert general.outputs[0].shape == [9]


def test_a_large_message_is_left_to_the_general_path():
    spec = TensorSpec(name="x", datatype="FP32", shape=(-1, 1024))
    pair = Pair(inputs=(spec,), max_batch=64)
    for rows, taken in ((32, True), (63, True), (64, False)):
        message = ModelInferRequest(model_name="m")
        message.inputs.add(name="x", datatype="FP32", shape=(rows, 1024))
        message.raw_input_contents.append(np.ones((rows, 1024), "f4").tobytes())
        short, general = pair.ask(message.SerializeToString())
        assert bool(short) is taken
        assert short in (None, general)
    pair.close()


def test_values_out_of_range_are_left_to_the_general_path_also_when_the_message_is_known(pair):
    good = asked(2, 3)
    assert pair.ask(good.SerializeToString())[0]
    for at, value in ((0, np.float32(1.5)), (0, np.float32("nan")), (1, np.int64(100)), (1, np.int64(-1))):
        wrong = ModelInferRequest.FromString(good.SerializeToString())
        content = wrong.raw_input_contents[at]
        wrong.raw_input_contents[at] = content[: -value.nbytes] + value.tobytes()
        assert pair.ask(wrong.SerializeToString())[0] is None


def pieces() -> st.SearchStrategy[bytes]:
    """Messages, and parts of them: put together, they are one message, in whatever order."""
    counts, ids = st.integers(1, 3), st.sampled_from(["", "a", "bc"])
    whole = st.builds(asked, counts, counts, ids, outputs=st.sampled_from([(), *WANTED]))
    only_id = st.builds(lambda text: ModelInferRequest(id=text), st.sampled_from(["q", "rs"]))
    odd = st.sampled_from(
        [
            ModelInferRequest(model_name="m"),
            ModelInferRequest(model_name="n"),
            ModelInferRequest(model_version="1"),
            ModelInferRequest(outputs=[ModelInferRequest.InferRequestedOutputTensor(name="score")]),
            ModelInferRequest(outputs=[ModelInferRequest.InferRequestedOutputTensor(name="layer:maps")]),
            ModelInferRequest(raw_input_contents=[b""]),
        ]
    )
    return st.one_of(whole, only_id, odd).map(lambda message: message.SerializeToString())


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    parts=st.lists(pieces(), min_size=1, max_size=3),
    flips=st.lists(st.tuples(st.integers(0), st.integers(0, 255)), max_size=3),
)
def test_whatever_it_takes_it_answers_as_the_general_path_does(pair, parts, flips):
    content = bytearray(b"".join(parts))
    for at, value in flips:
        content[at % (len(content) or 1)] = value
    first, general = pair.ask(bytes(content))
    assert first in (None, general)
    # Again, now that the message is known; and again without what tells it from others of its kind.
    assert pair.ask(bytes(content)) == (first, general)


def test_a_known_message_is_recognised_whatever_its_id_and_values():
    pair = Pair(**MODEL)
    heads: Heads = pair.short.rpc.short._short.__self__._heads
    first = asked(2, 3, "1").SerializeToString()
    assert heads.known(first) is None
    pair.ask(first)
    for identifier in ("", "22", "333"):
        known = heads.known(asked(2, 3, identifier, seed=4).SerializeToString())
        assert known
        assert known.contents == list(asked(2, 3, seed=4).raw_input_contents)
        assert ModelInferRequest.FromString(known.id_field).id == identifier
    for other in (asked(3, 2), asked(2, 3, "ü"), asked(2, 3, version="1"), asked(2, 3, "x" * 128)):
        assert heads.known(other.SerializeToString()) is None
    for cut in range(len(first)):
        assert heads.known(first[:cut]) is None
    assert heads.known(first + b"0") is None
    (model,) = heads._models.values()
    (length,) = model.lengths.values()
    model.lengths[len(first + first) - len(b"\n\1m\x1a\11")] = length  # as if another message had this size
    assert heads.known(first + first) is None
    pair.close()


@pytest.mark.parametrize(
    "hidden",
    [
        ModelInferRequest(id="later").SerializeToString(),
        ModelInferRequest(model_name="n").SerializeToString(),
        ModelInferRequest(raw_input_contents=[b"1234"]).SerializeToString(),
    ],
    ids=["id", "name", "values"],
)
def test_a_message_in_another_order_is_not_learned(hidden):
    pair = Pair()
    heads: Heads = pair.short.rpc.short._short.__self__._heads
    usual = request(1, 2, identifier="7").SerializeToString()
    pair.ask(usual[:5] + hidden + usual[5:])
    pair.ask(usual + hidden)
    assert not any(model.forms for model in heads._models.values())
    pair.ask(usual)
    assert heads.known(usual)
    pair.close()


def test_what_is_learned_of_a_model_is_not_said_of_the_one_that_takes_its_place():
    pair = Pair()
    raw = request(1, 2).SerializeToString()
    pair.ask(raw)
    heads: Heads = pair.short.rpc.short._short.__self__._heads
    assert heads.known(raw)
    service = pair.short.rpc.short._short.__self__
    other = pair.loop.run_until_complete(_other())
    service._answering._repository.models = {("m", 1): other.model}
    assert heads.known(raw) is None
    service._answering._repository.models = {}
    assert pair.loop.run_until_complete(_asked(pair.short, raw)) is None
    pair.loop.run_until_complete(other.batcher.close())
    pair.close()


async def _other() -> Subject:
    return Subject(True)


async def _asked(subject: Subject, raw: bytes) -> Any:
    return subject.ask(raw)
