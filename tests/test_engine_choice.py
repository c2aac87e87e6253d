"""Engines chosen for a real artefact: remembered between starts, overridden, shown, and all with the same answers."""

import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from serving import running
from test_server_inference import offline, request, rows_for, values_of

from layercast.models.manifest import Manifest
from layercast.proto.messages import ModelConfigRequest, ModelMetadataRequest
from layercast.server import banner, environment, tapping
from layercast.server.engines import remembered, timing
from layercast.server.engines.choice import Buckets, Candidate, Choice, ChosenEngine
from layercast.server.engines.source import Source
from layercast.server.loader import load
from layercast.server.model import Loaded
from layercast.server.settings import ModelSettings

ONE, TWO, SCRIPT, EAGER = (
    Candidate("onnx", 1),
    Candidate("onnx", 2),
    Candidate("torchscript", 2),
    Candidate("eager", 2),
)


@pytest.fixture(scope="module")
def artefact(tmp_path_factory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("exported"), 1, seed=1, programs=("torchscript", "onnx"))


class Timed:
    """Stands for the timing: tells what was tried, and chooses what the test says."""

    def __init__(self, *chosen: Candidate) -> None:
        self.chosen = chosen
        self.tried: list[list[Candidate]] = []

    def __call__(self, runs: Any, batch: Any, buckets: Buckets, processors: int) -> tuple[Choice, timing.Costs]:
        self.tried.append(list(runs))
        row = tuple(self.chosen[min(at, len(self.chosen) - 1)] for at in range(len(buckets.rows)))
        return Choice(buckets, (row,) * len(buckets.lengths)), {(0, 1): {ONE: 1e-4, TWO: float("inf")}}


@pytest.fixture
def timed(monkeypatch) -> Timed:
    fake = Timed(TWO)
    monkeypatch.setattr(timing, "fastest", fake)
    return fake


def loaded(artefact: Path, folder: Path | None, threads: int = 2, **settings: Any) -> Loaded:
    return load(artefact, ModelSettings(device="cpu", **settings), threads, choices=folder)


def test_a_choice_is_measured_once_and_kept(artefact, tmp_path, timed):
    first = loaded(artefact, tmp_path / "engines")
    timed.chosen = (SCRIPT,)
    second = loaded(artefact, tmp_path / "engines")
    assert timed.tried == [[ONE, TWO, SCRIPT, EAGER]]
    assert first.engines == second.engines == "onnx (2 threads)"
    assert second.runner.fast._session.get_session_options().intra_op_num_threads == 2
    (path,) = (tmp_path / "engines").iterdir()
    kept = json.loads(path.read_text())
    assert kept["chosen"] == "onnx (2 threads)"
    assert kept["measured"] == [{"length": 0, "rows": 1, "microseconds": {"onnx (1 thread)": 100.0}}]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b'{"cells": 3}',
        b'{"cells": [["onnx"]]}',
        b'{"cells": [[["onnx", 2]]]}',
        b'{"cells": [[["onnx", 3]]]}',
        b"[" * 100_000,
    ],
)
def test_a_file_that_is_not_what_was_kept_is_measured_again_and_replaced(artefact, tmp_path, timed, content):
    loaded(artefact, tmp_path)
    (path,) = tmp_path.iterdir()
    right = path.read_bytes()
    path.write_bytes(content)
    assert loaded(artefact, tmp_path).engines == "onnx (2 threads)"
    assert len(timed.tried) == 2
    assert path.read_bytes() == right
    assert list(tmp_path.iterdir()) == [path]


def test_another_artefact_budget_batch_machine_or_library_is_measured_anew(artefact, tmp_path, timed, monkeypatch):
    other = tiny.write(tmp_path / "other", 1, seed=2, programs=("torchscript", "onnx"))
    folder = tmp_path / "engines"
    timed.chosen = (ONE,)
    for measured in (1, 1):  # measured once, and found the second time
        loaded(artefact, folder)
        assert len(timed.tried) == measured
    loaded(other, folder)
    loaded(artefact, folder, threads=4)
    loaded(artefact, folder, max_batch=8)
    assert len(timed.tried) == 4
    with monkeypatch.context() as patch:
        patch.setattr(remembered, "_machine", lambda device: ["another"])
        loaded(artefact, folder)
    with monkeypatch.context() as patch:
        patch.setattr(remembered, "tool_versions", lambda: {"torch": "9"})
        loaded(artefact, folder)
    assert len(timed.tried) == len(list(folder.iterdir())) == 6
    loaded(artefact, folder)
    assert len(timed.tried) == 6


def test_a_folder_that_cannot_be_written_costs_only_the_next_start(artefact, tmp_path, timed, caplog):
    (tmp_path / "file").write_text("")
    assert loaded(artefact, tmp_path / "file").engines == "onnx (2 threads)"
    assert "can't be kept for the next start" in caplog.text
    assert str(tmp_path) not in caplog.text


def test_only_so_many_choices_are_kept(artefact, tmp_path, timed, monkeypatch):
    monkeypatch.setattr(remembered, "_MOST", 3)
    for most in range(1, 6):
        loaded(artefact, tmp_path, max_batch=most)
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("engine", ["eager", "torchscript"])
def test_an_engine_that_is_set_is_taken_unmeasured(artefact, tmp_path, timed, engine):
    model = loaded(artefact, tmp_path, engine=engine)
    assert (model.runner.fast.name, model.engines) == (engine, f"{engine} (2 threads)")
    assert not timed.tried
    assert not list(tmp_path.iterdir())


def test_with_onnx_set_only_its_threads_are_measured(artefact, tmp_path, timed):
    assert loaded(artefact, tmp_path, engine="onnx").engines == "onnx (2 threads)"
    assert timed.tried == [[ONE, TWO]]
    assert loaded(artefact, tmp_path, threads=1, engine="onnx").engines == "onnx (1 thread)"
    assert len(timed.tried) == 1


@pytest.mark.parametrize(("chosen", "threads"), [(ONE, 1), (TWO, 2), (EAGER, 2)], ids=str)
def test_parts_of_the_program_compute_with_as_many_threads_as_the_whole(artefact, timed, monkeypatch, chosen, threads):
    timed.chosen = (chosen,)
    found = []
    monkeypatch.setattr(tapping, "program", lambda *arguments: found.append(arguments[3]))
    loaded(artefact, None)
    assert found == [threads]


def test_engines_that_run_nothing_leave_memory(artefact, timed, monkeypatch):
    made: dict[Candidate, weakref.ref[object]] = {}
    real = Source._program

    def noted(source: Source, candidate: Candidate) -> object:
        engine = real(source, candidate)
        made[candidate] = weakref.ref(engine)
        return engine

    monkeypatch.setattr(Source, "_program", noted)
    timed.chosen = (ONE, SCRIPT)
    model = loaded(artefact, None, instances=1)
    assert isinstance(model.runner.fast, ChosenEngine)
    assert model.runner.eager is not None
    assert {candidate for candidate, engine in made.items() if engine()} == {ONE, SCRIPT}


def test_a_batch_runs_on_the_engine_of_its_rows_and_length_and_answers_the_same_on_any(repository, modules):
    directory = repository / "transformer" / "1"
    manifest = Manifest.read(directory)
    engines = {
        candidate: loaded(directory, None, engine=candidate.engine).runner.fast for candidate in (SCRIPT, EAGER)
    } | {ONE: loaded(directory, None, threads=1, engine="onnx").runner.fast}
    buckets = Buckets.of(manifest.inputs, 4)
    assert (buckets.rows, buckets.lengths) == ((1, 2, 4), (16, 32))
    chosen = ChosenEngine(Choice(buckets, ((ONE, ONE, SCRIPT), (ONE, EAGER, EAGER))), engines, manifest.inputs)
    assert (chosen.name, chosen.device) == ("onnx+eager+torchscript", "cpu")
    for rows, length, candidate in (
        (1, 16, ONE), (2, 1, ONE), (3, 16, SCRIPT), (4, 16, SCRIPT), (9, 16, SCRIPT),
        (1, 17, ONE), (2, 32, EAGER), (4, 17, EAGER),
    ):  # fmt: skip
        tokens = rows_for("transformer", rows, length)
        assert chosen.pick({"tokens": tokens}) is engines[candidate]
        wanted = offline(modules["transformer"], tokens)
        for engine in (chosen, *engines.values()):
            np.testing.assert_allclose(engine.run({"tokens": tokens})["logits"], wanted, atol=1e-5)


def test_a_real_measurement_gives_a_choice_whose_answers_are_right(artefact, tmp_path):
    model = loaded(artefact, tmp_path)
    for rows in (1, 2, 5, 64):
        x = np.resize(tiny.ROWS, (rows, 10))
        np.testing.assert_allclose(model.runner.fast.run({"x": x})["output"], tiny.expected(1, x), atol=1e-5)
    assert loaded(artefact, tmp_path).engines == model.engines


def test_an_operator_sees_what_runs_what(repository, modules, tmp_path, timed, monkeypatch):
    shutil.copytree(repository / "shared", tmp_path / "shared")
    monkeypatch.setattr(environment, "cpu_budget", lambda: 2)
    timed.chosen = (ONE, SCRIPT)
    text = "onnx (1 thread) 1 row, torchscript (2 threads) 2-8 rows"
    with running(tmp_path, max_batch=8, device="cpu", cache=tmp_path / "cache") as server:
        metadata = server.call("ModelMetadata", ModelMetadataRequest(name="shared"))
        config = server.call("ModelConfig", ModelConfigRequest(name="shared")).config
        assert (metadata.properties["engine"], metadata.properties["engines"]) == ("torchscript+onnx", text)
        assert config.parameters["engines"].string_value == text
        assert "torchscript+onnx" in banner.table(server.server.repository.versions())
        assert len(list((tmp_path / "cache" / "engines").iterdir())) == 1
        for rows in (1, 2, 8):
            x = rows_for("shared", rows)
            got = values_of(server.call("ModelInfer", request("shared", x)))
            np.testing.assert_allclose(got, offline(modules["shared"], x), atol=1e-5)


def test_more_instances_than_processors_are_said(artefact, timed, caplog):
    timed.chosen = (ONE,)
    model = loaded(artefact, None, threads=2, instances=3)
    assert (len(model.runners), model.threads) == (3, 1)
    assert "tiny: 3 instances on 2 processors" in caplog.text
