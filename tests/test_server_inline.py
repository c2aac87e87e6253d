"""Small models on a real server: their batches run on the event loop, and the answers are the model's."""

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import onnx
import pytest
import tiny
from holding import serving_shared
from test_server_inference import offline, request, rows_for, values_of

from layercast.models.manifest import file_entry
from layercast.server.batching import patience
from layercast.server.loader import load
from layercast.server.settings import ModelSettings


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
