"""Small models on a real server: their batches run on the event loop, and the answers are the model's."""

import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import tiny
from holding import serving_shared
from serving import running
from test_server_inference import offline, request, rows_for, values_of

from layercast.models.manifest import TensorSpec, file_entry
from layercast.server.batching import patience
from layercast.server.engines import inline
from layercast.server.engines.onnx import open_session
from layercast.server.inline import Inline, up_to
from layercast.server.loader import load
from layercast.server.settings import ModelSettings


class Positions:
    """An engine that takes texts of 32 tokens at most."""

    name, device = "onnx", "cpu"

    def run(self, inputs: Any) -> Any:
        if inputs["tokens"].shape[1] > 32:
            raise RuntimeError("index 32 is out of bounds")
        return inputs


def test_lengths_that_a_program_does_not_take_are_left_to_whoever_asks_for_them(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(inline, "_steady", lambda *_: True)

    def batch(rows: int, length: int) -> Any:
        return {"tokens": np.zeros((rows, length), np.int64)}

    manifest = SimpleNamespace(name="texts")
    found = inline.inline_of(Positions(), tmp_path, manifest, batch, (1, 2), (16, 32, 48, 64))
    assert found == Inline(up_to(2).rows * 2, (16, 32))
    assert "texts fails at 1 rows, 48 long: RuntimeError: index 32 is out of bounds" in caplog.text


def test_each_size_says_of_how_many_requests_it_must_be_for_the_loop_to_wait_for_it(tmp_path, monkeypatch):
    monkeypatch.setattr(inline, "_steady", lambda *_: True)
    monkeypatch.setattr(inline, "_seconds", lambda _, inputs: 1e-5 * len(inputs["tokens"]))

    def batch(rows: int, length: int) -> Any:
        return {"tokens": np.zeros((rows, length), np.int64)}

    rows = (1, 64, 96, 128, 249, 251, 300)
    found = inline.inline_of(Positions(), tmp_path, SimpleNamespace(name="texts"), batch, rows, (0,))
    assert found == Inline((((64, 0), (96, 3), (128, 6), (249, 18)),))


@pytest.mark.parametrize(
    ("settings", "here"),
    [
        ('engine = "onnx"\n', True),
        ('engine = "onnx"\ninstances = 2\n', False),
        ('engine = "torchscript"\n', False),
        ('engine = "eager"\n', False),
    ],
)
def test_only_the_steady_engine_of_a_single_instance_runs_on_the_loop(
    repository, modules, tmp_path, monkeypatch, settings, here
):
    monkeypatch.setattr(patience, "_BUNCH", 0)  # as if requests came in bunches
    with serving_shared(repository, tmp_path, f"max_delay_ms = 0\n{settings}") as server:
        model = server.server.repository.find("shared", "")
        loop = server.on_loop(threading.get_ident)
        ran: set[int] = set()

        def noted(run: Any) -> Any:
            def note(inputs: Any) -> Any:
                ran.add(threading.get_ident())
                return run(inputs)

            return note

        for runner in model.loaded.runners:
            runner.fast.run = noted(runner.fast.run)
        xs = [rows_for("shared", 1 + at % 3) for at in range(40)]
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda x: server.call("ModelInfer", request("shared", x)), xs))
        for x, answer in zip(xs, answers, strict=True):
            np.testing.assert_allclose(values_of(answer), offline(modules["shared"], x), atol=1e-5)
        assert (loop in ran) == here == (bool(model.batcher.limits.inline))


def test_short_texts_run_on_the_loop_and_long_ones_in_the_thread(repository, modules, tmp_path, monkeypatch):
    monkeypatch.setattr(inline, "_seconds", lambda engine, inputs: 1e-4 if inputs["tokens"].shape[1] <= 16 else 1.0)
    shutil.copytree(repository / "transformer", tmp_path / "transformer")
    ran: set[tuple[bool, bool]] = set()
    with running(tmp_path, max_batch=8, device="cpu", engine="onnx", instances=1) as server:
        model = server.server.repository.find("transformer", "")
        assert model.batcher.limits.inline == Inline(up_to(8).rows, (16,))
        loop, real = server.on_loop(threading.get_ident), model.loaded.runner.fast.run

        def noted(inputs: Any) -> Any:
            ran.add((inputs["tokens"].shape[1] <= 16, threading.get_ident() == loop))
            return real(inputs)

        model.loaded.runner.fast.run = noted
        texts = [rows_for("transformer", 1 + at % 3, (3, 16, 17, 9, 32)[at % 5]) for at in range(40)]
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda x: server.call("ModelInfer", request("transformer", x)), texts))
    for text, answer in zip(texts, answers, strict=True):
        np.testing.assert_allclose(values_of(answer), offline(modules["transformer"], text), atol=1e-5)
    assert ran == {(True, True), (False, False)}


def test_threads_that_compute_together_sleep_between_batches(repository):
    session = open_session((repository / "shared" / "1" / "model.onnx").read_bytes(), "model.onnx", 2)
    inputs, idle = {session.get_inputs()[0].name: np.resize(rows_for("shared", 1), (4096, 10))}, 0.0
    for _ in range(40):
        session.run(None, inputs)
        before = time.process_time()
        time.sleep(0.005)
        idle += time.process_time() - before
    assert idle < 0.05


@pytest.mark.parametrize(
    ("inputs", "lengths"),
    [
        ([{"shape": (-1, 4)}], (0,)),
        ([{"shape": (-1, -1), "pad": 0, "max_length": 40}], (16, 32, 40)),
        ([{"shape": (-1, -1), "pad": 0}, {"shape": (-1, -1), "pad": 1}], (16, 32, 48, 64, 96, 128, 192, 256)),
        ([{"shape": (-1, -1), "pad": 0}, {"shape": (-1, 4), "pad": 0}], ()),
        ([{"shape": (-1, -1)}], ()),
        ([{"shape": (-1, -1, -1), "pad": 0}], ()),
        ([{"shape": (-1, 4), "datatype": "BYTES"}], ()),
    ],
)
def test_only_where_texts_have_one_length_is_it_known_how_long_they_take(inputs, lengths):
    specs = [TensorSpec(**{"name": f"x{at}", "datatype": "INT64", **given}) for at, given in enumerate(inputs)]
    assert inline.lengths_of(specs) == lengths


def test_a_program_whose_time_depends_on_values_runs_in_the_thread(repository, tmp_path):
    root = tmp_path / "repository"
    shutil.copytree(repository / "shared", root / "shared")
    path = root / "shared" / "1" / "model.onnx"
    model = onnx.load(path)
    (output,) = model.graph.output
    model.graph.node.extend(
        [
            onnx.helper.make_node("NonZero", [output.name], ["where"]),
            onnx.helper.make_node("Shape", ["where"], ["count"]),
        ]
    )
    onnx.save(model, path)
    entry = file_entry(path).model_dump()
    tiny.edit_manifest(path.parent, lambda manifest: manifest["files"].update({path.name: entry}))
    assert load(repository / "shared" / "1", ModelSettings(engine="onnx"), 1).inline.takes(1, 1, 0)
    assert not load(path.parent, ModelSettings(engine="onnx"), 1).inline
