"""Engines on a card that is a stand-in: graphs, staging, streams and binding are ours, what they compute is torch's."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from conftest import card_of
from fake_card import FakeCard, use
from test_server_inference import offline, rows_for
from torch import nn

from layercast.models.export.writer import export_artefact
from layercast.models.foreign.factory import Code, build
from layercast.models.foreign.trust import ARTEFACT_CODE, Trust
from layercast.models.hooks import FeatureExtractor
from layercast.models.manifest import Manifest
from layercast.server.engines import cuda
from layercast.server.engines.base import EngineError
from layercast.server.engines.choice import Buckets
from layercast.server.engines.eager import EagerEngine
from layercast.server.engines.onnx import OnnxEngine
from layercast.server.loader import load
from layercast.server.settings import ModelSettings
from layercast.server.work import Tap

CUDA = torch.device("cuda", 0)
CARD = cuda.Card  # which `use` replaces


@pytest.fixture(scope="module")
def artefact(tmp_path_factory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("exported"), 1, seed=1, programs=("torchscript", "onnx"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory, modules) -> Path:
    directory = tmp_path_factory.mktemp("texts") / "1"
    export_artefact(modules["transformer"], card_of("transformer"), directory, programs=())
    return directory


@pytest.fixture
def cards() -> Iterator[list[FakeCard]]:
    with use() as made:
        yield made


def eager(module: nn.Module, directory: Path, max_batch: int = 8) -> EagerEngine:
    manifest = Manifest.read(directory)
    engine = EagerEngine(module, manifest, CUDA)
    engine.capture(Buckets.of(manifest.inputs, max_batch))
    return engine


def test_every_size_of_batch_gives_its_own_rows_whatever_ran_before(artefact, cards):
    engine = eager(tiny.module(1), artefact)
    rng = np.random.default_rng(0)
    for rows in (3, 8, 1, 2, 7, 9, 5, 20, 4, 8):
        x = rng.random((rows, 10), dtype="f4")
        x.flags.writeable = False
        cards[0].log.clear()
        got = engine.run({"x": x})["output"]
        np.testing.assert_allclose(got, tiny.expected(1, x), atol=1e-6)
        assert ("compute: replay" in cards[0].log) == (rows <= 8)


def test_a_replay_waits_for_what_it_needs_and_no_memory_is_used_again_too_early(artefact, cards):
    engine = eager(tiny.module(1), artefact)
    engine.run({"x": tiny.ROWS})
    cards[0].log.clear()
    first = engine.run({"x": tiny.ROWS})["output"]
    assert cards[0].log == [
        "host: wait for copy",  # the last batch has left the memory that this one is staged in
        "copy: wait for compute",  # and its graph has read its inputs
        "copy: copy [4, 10]",
        "copy: record",
        "compute: wait for copy",
        "compute: replay",
        "compute: copy [3, 10]",
        "compute: record",
        "host: wait for compute",
    ]
    kept = first.copy()
    engine.run({"x": np.zeros_like(tiny.ROWS)})
    np.testing.assert_array_equal(first, kept)


def test_a_batch_without_a_graph_keeps_its_memory_until_it_was_computed(artefact, cards):
    engine = EagerEngine(tiny.module(1), Manifest.read(artefact), CUDA)
    engine.run({"x": tiny.ROWS})
    cards[0].log.clear()
    engine.run({"x": tiny.ROWS[:2]})
    assert cards[0].log == [
        "host: wait for copy",
        "copy: copy [2, 10]",
        "copy: record",
        "compute: wait for copy",
        "compute: keep [2, 10]",
        "compute: copy [2, 10]",
        "compute: record",
        "host: wait for compute",
    ]


def test_graphs_are_recorded_largest_first_after_forwards_that_are_none(artefact, cards):
    calls: list[int] = []
    module = tiny.module(1)
    module.register_forward_hook(lambda module, inputs, output: calls.append(len(output)))
    eager(module, artefact, max_batch=4)
    assert calls[:12] == [4] * 4 + [2] * 4 + [1] * 4
    assert cards[0].log.count("capture: record a graph") == 3


@pytest.mark.parametrize(
    ("max_batch", "sizes"),
    [(1, [1]), (20, [1, 2, 4, 8, 12, 16, 20]), (500, [1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128])],
)
def test_graphs_have_sizes_up_to_the_largest_batch_in_small_steps(artefact, cards, max_batch, sizes):
    engine = eager(tiny.module(1), artefact, max_batch)
    x = np.resize(tiny.ROWS, (max_batch, 10))
    fitting = [engine._graphs.fitting({"x": x[:rows]}) for rows in range(1, max_batch + 1)]
    assert sorted({graph.rows for graph in fitting if graph}) == sizes
    for rows, graph in enumerate(fitting, 1):
        assert graph is None if rows > 128 else graph.rows == min(size for size in sizes if size >= rows)


def test_rows_that_a_graph_has_too_many_repeat_a_real_one(artefact, cards):
    engine = eager(tiny.module(1), artefact)
    engine.run({"x": tiny.ROWS})
    graph = engine._graphs.fitting({"x": tiny.ROWS})
    assert graph.rows == 4
    np.testing.assert_array_equal(graph.inputs["x"].numpy(), tiny.ROWS[[0, 1, 2, 0]])


def test_texts_are_padded_to_a_graph_and_masked(texts, modules, cards):
    engine = eager(modules["transformer"], texts, max_batch=2)
    for rows, length in ((1, 16), (2, 5), (1, 32), (2, 17), (1, 1), (2, 16)):
        tokens = rows_for("transformer", rows, length)
        cards[0].log.clear()
        got = engine.run({"tokens": tokens})["logits"]
        np.testing.assert_allclose(got, offline(modules["transformer"], tokens), atol=1e-5)
        assert "compute: replay" in cards[0].log


class Waits(nn.Module):
    """Looks at a value on the host."""

    def forward(self, x):
        return x * 2 if x.sum().item() > 0 else x


class Computes(nn.Module):
    """Computes with numpy, which a graph does not see: it would repeat the value of its capture."""

    def forward(self, x):
        return x + float(x.numpy().sum())


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (Waits(), "RuntimeError: operation not permitted when stream is capturing"),
        (Computes(), "the graph of 8 rows gives other outputs than the module"),
    ],
    ids=["waits", "computes"],
)
def test_a_forward_that_no_graph_can_hold_runs_layer_by_layer_and_the_log_says_why(
    artefact, cards, caplog, module, why
):
    engine = eager(module.eval(), artefact)
    assert caplog.messages == [f"tiny: no CUDA graphs, every batch runs layer by layer: {why}"]
    logged = len(cards[0].log)
    for values in (tiny.ROWS, -tiny.ROWS):
        with torch.inference_mode():
            wanted = module(torch.from_numpy(values)).numpy()
        np.testing.assert_allclose(engine.run({"x": values})["output"], wanted, rtol=1e-5)
    assert "compute: replay" not in cards[0].log[logged:]


def test_only_what_a_reducer_left_comes_back(texts, modules, cards):
    engine = EagerEngine(modules["transformer"], Manifest.read(texts), CUDA)
    tokens = rows_for("transformer", 3, 20)
    layer = next(layer.path for layer in Manifest.read(texts).layers if layer.available and len(layer.shape) == 3)
    outputs, features = engine.tapped({"tokens": tokens}, [Tap(layer, "mean")], predict=False)
    assert outputs == {}
    with torch.inference_mode(), FeatureExtractor(modules["transformer"], [f"{layer}@mean"]) as extractor:
        mask = torch.from_numpy(tokens != 256)
        (wanted,) = extractor.run(torch.from_numpy(tokens), token_mask=mask).features.values()
    np.testing.assert_allclose(features[Tap(layer, "mean")], wanted.numpy(), atol=1e-6)
    assert cards[0].copied == [tokens.nbytes, wanted.nbytes]


def test_outputs_and_layers_come_together(artefact, cards):
    engine = EagerEngine(tiny.module(1), Manifest.read(artefact), CUDA)
    layer = next(layer.path for layer in Manifest.read(artefact).layers if layer.available)
    outputs, features = engine.tapped({"x": tiny.ROWS}, [Tap(layer)], predict=True)
    np.testing.assert_allclose(outputs["output"], tiny.expected(1), atol=1e-6)
    assert list(features) == [Tap(layer)]
    assert len(features[Tap(layer)]) == 3


def test_onnx_runtime_reads_and_writes_where_the_card_computes(artefact, cards):
    engine = OnnxEngine(artefact, Manifest.read(artefact), CUDA, 1)
    assert (engine.name, engine.device) == ("onnx", "cuda")
    for rows in (3, 1, 2):
        x = tiny.ROWS[:rows]
        cards[0].log.clear()
        np.testing.assert_allclose(engine.run({"x": x})["output"], tiny.expected(1, x), atol=1e-5)
        assert "compute: wait for copy" in cards[0].log
        assert f"compute: copy [{rows}, 10]" in cards[0].log


WIDE = b"""
from torch import nn

class Wide(nn.Module):
    def forward(self, x):
        return x * 2
"""


def test_onnx_runtime_makes_room_itself_for_outputs_of_any_size(tmp_path, cards):
    spec = {"datatype": "FP32", "shape": [-1, -1]}
    card = {
        "name": "wide", "architecture": "wide.py:Wide", "arguments": {},
        "inputs": [{"name": "x", **spec}], "outputs": [{"name": "y", **spec}],
    }  # fmt: skip
    (tmp_path / "wide.py").write_bytes(WIDE)
    code = Code("wide.py", WIDE, tmp_path / "wide.py")
    module = build("wide.py:Wide", {}, Trust.of([ARTEFACT_CODE]), code).eval()
    export_artefact(module, card, tmp_path / "1", programs=("onnx",), code=code)
    engine = OnnxEngine(tmp_path / "1", Manifest.read(tmp_path / "1"), CUDA, 1)
    for shape in ((2, 5), (3, 1)):
        x = np.random.default_rng(0).random(shape, dtype="f4")
        np.testing.assert_array_equal(engine.run({"x": x})["y"], x * 2)


def test_onnx_runtime_that_would_run_on_the_cpu_unasked_is_refused(artefact, capfd):
    class Asks(FakeCard):
        def providers(self, stream: Any) -> list[Any]:
            return CARD.providers(SimpleNamespace(device=CUDA), stream)  # type: ignore[arg-type]

    if cuda.count():
        pytest.skip("CUDA works here")
    with use(card=Asks), pytest.raises(EngineError, match="has no working CUDAExecutionProvider; it would run on the"):
        OnnxEngine(artefact, Manifest.read(artefact), CUDA, 1)
    assert CARD.providers(SimpleNamespace(device=torch.device("cuda", 3)), SimpleNamespace(cuda_stream=77)) == [
        (
            "CUDAExecutionProvider",
            {
                "device_id": 3,
                "user_compute_stream": "77",
                "use_tf32": 0,
                "cudnn_conv_algo_search": "HEURISTIC",
                "arena_extend_strategy": "kSameAsRequested",
            },
        ),
        "CPUExecutionProvider",
    ]


@pytest.mark.parametrize("engine", ["auto", "eager", "onnx", "torchscript"])
def test_a_version_loads_on_a_card_with_any_engine(artefact, cards, engine):
    model = load(artefact, ModelSettings(device="cuda", engine=engine, max_batch=4), 2)
    assert model.runner.fast.device == "cuda"
    assert model.cards == (0,)
    for rows in (1, 3, 4):
        got = model.runner.fast.run({"x": tiny.ROWS[:rows]})["output"]
        np.testing.assert_allclose(got, tiny.expected(1, tiny.ROWS[:rows]), atol=1e-5)


def test_graphs_of_an_engine_that_runs_no_plain_batch_are_given_back(artefact, cards, monkeypatch):
    from layercast.server.engines import timing
    from layercast.server.engines.choice import Candidate, Choice

    def onnx_wins(runs, batch, buckets, processors, here):
        return Choice.only(Candidate("onnx", 2), buckets), {}

    monkeypatch.setattr(timing, "fastest", onnx_wins)
    model = load(artefact, ModelSettings(device="cuda", max_batch=2), 2)
    assert model.runner.fast.name == "onnx"
    assert model.runner.eager is not None
    assert model.runner.eager._graphs is None
    assert any("record a graph" in line for card in cards for line in card.log)
