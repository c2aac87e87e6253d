"""Engines chosen for a real artefact: remembered between starts, overridden, shown, and all with the same answers."""

import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from serving import running
from test_server_inference import offline, request, rows_for, values_of

from layercast.models.manifest import Manifest
from layercast.proto.messages import ModelConfigRequest, ModelMetadataRequest
from layercast.server import banner, environment, memory, tapping
from layercast.server.engines import inline, instances, remembered, selection, timing
from layercast.server.engines.choice import Buckets, Candidate, Choice, ChosenEngine
from layercast.server.engines.others import Others
from layercast.server.engines.source import Source
from layercast.server.inline import NOWHERE, up_to
from layercast.server.loader import load
from layercast.server.model import Loaded
from layercast.server.settings import ModelSettings
from layercast.server.work import Tap

ONE, TWO, SCRIPT, EAGER = (
    Candidate("onnx", 1),
    Candidate("onnx", 2),
    Candidate("torchscript", 2),
    Candidate("eager", 2),
)
SCRIPT_ALONE, EAGER_ALONE = Candidate("torchscript", 1), Candidate("eager", 1)
EVERY = [ONE, TWO, SCRIPT_ALONE, SCRIPT, EAGER_ALONE, EAGER]


@pytest.fixture(scope="module")
def artefact(tmp_path_factory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("exported"), 1, seed=1, programs=("torchscript", "onnx"))


class Timed:
    """Stands for the timing: tells what was tried, and chooses what the test says.

    Several instances gain `gain`; a lone batch takes `part` of the time on all processors.
    """

    def __init__(self, *chosen: Candidate) -> None:
        self.chosen = chosen
        self.tried: list[list[Candidate]] = []
        self.here: list[set[Candidate]] = []
        self.gain, self.part, self.inline, self.busy = 0.0, 1.0, NOWHERE, False

    def __call__(
        self, runs: Any, batch: Any, buckets: Buckets, processors: int, here: Any
    ) -> tuple[Choice, timing.Costs]:
        self.tried.append(list(runs))
        self.here.append(here)
        row = tuple(self.chosen[min(at, len(self.chosen) - 1)] for at in range(len(buckets.rows)))
        return Choice(buckets, (row,) * len(buckets.lengths)), {(0, 1): {ONE: 1e-4, TWO: float("inf")}}


def put_in_place(fake: Timed, monkeypatch) -> Timed:
    """Let `fake` stand for all that is measured when an artefact is loaded."""
    monkeypatch.setattr(timing, "fastest", fake)
    monkeypatch.setattr(instances, "gain", lambda *timed: fake.gain)
    monkeypatch.setattr(instances, "part", lambda *timed: fake.part)
    monkeypatch.setattr(selection, "inline_of", lambda *timed: fake.inline)
    monkeypatch.setattr(Others, "are_busy", lambda others, processors: fake.busy)
    return fake


@pytest.fixture
def timed(monkeypatch) -> Timed:
    return put_in_place(Timed(TWO), monkeypatch)


def loaded(artefact: Path, folder: Path | None, threads: int = 2, **settings: Any) -> Loaded:
    return load(artefact, ModelSettings(device="cpu", **settings), threads, choices=folder)


def test_a_choice_is_measured_once_and_kept(artefact, tmp_path, timed):
    first = loaded(artefact, tmp_path / "engines")
    timed.chosen = (SCRIPT,)
    second = loaded(artefact, tmp_path / "engines")
    assert timed.tried == [EVERY]
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
        json.dumps({"cells": [[TWO] * 7]}).encode(),
        json.dumps({"cells": [[TWO] * 7], "instances": "two"}).encode(),
        json.dumps({"cells": [[TWO] * 7], "instances": 0, "alone": None}).encode(),
        json.dumps({"cells": [[TWO] * 7], "instances": 1}).encode(),
        json.dumps({"cells": [[TWO] * 7], "instances": 1, "alone": [[TWO] * 6]}).encode(),
        json.dumps({"cells": [[TWO] * 7], "instances": 1, "alone": [[["onnx", 3]] * 7]}).encode(),
        json.dumps({"cells": [[TWO] * 7], "instances": 1, "alone": None, "busy_starts": "no"}).encode(),
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


def test_what_was_measured_on_a_busy_machine_is_measured_again_but_not_for_ever(artefact, tmp_path, timed, caplog):
    timed.busy = True
    for starts in (1, 2):
        assert loaded(artefact, tmp_path).engines == "onnx (2 threads)"
        assert len(timed.tried) == starts
    assert "busy with something else" in caplog.text
    timed.busy, timed.chosen = False, (ONE,)
    for _ in range(2):
        assert loaded(artefact, tmp_path).engines == "onnx (1 thread)"
    assert len(timed.tried) == 3
    timed.busy = True
    for tried in (4, 5, 6, 6, 6):
        loaded(artefact, tmp_path, max_batch=8)
        assert len(timed.tried) == tried


def test_only_what_would_run_on_the_event_loop_is_weighed_as_if_it_did(artefact, timed, monkeypatch):
    loaded(artefact, None)
    loaded(artefact, None, threads=4, instances=2)
    monkeypatch.setattr(inline, "_steady", lambda *program: False)
    loaded(artefact, None)
    assert timed.here == [{ONE, TWO}, set(), set()]


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="only Linux tells")
def test_memory_that_large_batches_took_while_engines_were_timed_is_given_back(artefact, timed, monkeypatch):
    rows = np.ones((1_000_000, 10), "f4")

    def large(runs: Any, *others: Any) -> Any:
        for run in runs.values():
            run({"x": rows})
        taken.append(resident())
        return timed(runs, *others)

    def resident() -> int:
        memory.trim()
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("Rss:")) >> 10

    taken: list[int] = []
    monkeypatch.setattr(timing, "fastest", large)
    model = loaded(artefact, None)
    assert model.engines == "onnx (2 threads)"
    assert taken[0] - resident() > 140, "both sessions took 80 MB and more"


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


@pytest.mark.parametrize("engine", ["onnx", "eager", "torchscript"])
def test_of_an_engine_that_is_set_only_the_threads_are_measured(artefact, tmp_path, timed, engine):
    one, two = Candidate(engine, 1), Candidate(engine, 2)
    timed.chosen = (two,)
    model = loaded(artefact, tmp_path, engine=engine)
    assert (model.runner.fast.name, model.engines) == (engine, f"{engine} (2 threads)")
    assert timed.tried == [[one, two]]
    assert loaded(artefact, tmp_path, threads=1, engine=engine).engines == f"{engine} (1 thread)"
    assert len(timed.tried) == 1


@pytest.mark.parametrize(("engine", "alone"), [("torchscript", SCRIPT_ALONE), ("eager", EAGER_ALONE)])
def test_torch_computes_a_batch_with_the_threads_that_were_chosen(artefact, timed, engine, alone):
    timed.chosen = (alone,)
    model = loaded(artefact, None, engine=engine)
    threads, own = [], model.runner.fast.engine
    real = own._place.run

    def noted(inputs: Any, forward: Any) -> Any:
        threads.append(torch.get_num_threads())
        return real(inputs, forward)

    own._place.run = noted
    torch.set_num_threads(2)
    for wanted in (1, 2):
        got = (model.runner.fast if wanted == 1 else own).run({"x": tiny.ROWS})["output"]
        np.testing.assert_allclose(got, tiny.expected(1, tiny.ROWS), atol=1e-5)
    assert threads == [1, 2]


def test_where_several_instances_gain_they_run_and_share_the_weights(artefact, tmp_path, timed):
    timed.chosen, timed.gain = (SCRIPT,), 1.5
    model = loaded(artefact, tmp_path)
    one, two = model.runners
    assert (model.engines, model.threads) == ("2 instances: onnx (1 thread)", 1)
    assert one.fast is two.fast
    pointers = [[tensor.data_ptr() for tensor in runner.eager._module.parameters()] for runner in model.runners]
    assert pointers[0] == pointers[1]
    assert one.eager._module is not two.eager._module
    assert model.memory_bytes == one.eager.memory_bytes
    timed.gain = 0.0
    assert loaded(artefact, tmp_path).engines == model.engines, "remembered"
    assert len(timed.tried) == 1


@pytest.mark.parametrize(
    ("gain", "inline", "settings"),
    [
        (0.9, NOWHERE, {}),
        (2.0, up_to(0, 16), {}),
        (2.0, up_to(0, 4), {"max_batch": 4}),
        (2.0, NOWHERE, {"instances": 1}),
        (2.0, NOWHERE, {"threads": 1}),
    ],
)
def test_one_instance_runs_what_gains_nothing_or_runs_on_the_loop_or_is_asked_for(
    artefact, timed, gain, inline, settings
):
    timed.chosen, timed.gain, timed.inline = (ONE,), gain, inline
    model = loaded(artefact, None, **settings)
    assert (model.engines, len(model.runners)) == ("onnx (1 thread)", 1)


def test_a_few_requests_on_the_loop_are_no_reason_against_several_instances(artefact, timed):
    timed.chosen, timed.gain, timed.inline = (ONE,), 2.0, up_to(8, 8)
    assert len(loaded(artefact, None).runners) == 2


def test_instances_that_are_asked_for_are_not_those_that_were_measured(artefact, tmp_path, timed):
    timed.chosen, timed.gain = (ONE,), 2.0
    assert len(loaded(artefact, tmp_path).runners) == 2
    assert len(loaded(artefact, tmp_path, instances=1).runners) == 1
    assert loaded(artefact, tmp_path, threads=6, instances=3).engines == "3 instances: onnx (1 thread)"


def test_layers_read_by_one_instance_are_no_business_of_another(artefact, timed):
    timed.chosen, timed.gain = (EAGER_ALONE,), 2.0
    model = loaded(artefact, None, engine="eager")
    one, two = model.runners
    hooks, real = [], one.eager._module.forward

    def meanwhile(*args: Any, **named: Any) -> Any:
        np.testing.assert_allclose(two.fast.run({"x": tiny.ROWS})["output"], tiny.expected(1, tiny.ROWS), atol=1e-5)
        hooks.append((one.eager.hooks > 0, two.eager.hooks))
        return real(*args, **named)

    one.eager._module.forward = meanwhile
    layer = next(layer.path for layer in model.manifest.layers if layer.available)
    outputs, taps = one.eager.tapped({"x": tiny.ROWS}, [Tap(layer)], predict=True)
    np.testing.assert_allclose(outputs["output"], tiny.expected(1, tiny.ROWS), atol=1e-5)
    assert list(taps) == [Tap(layer)]
    assert hooks == [(True, 0)]


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
    # Torch's program is the same for any number of threads, and was made for the first that was tried.
    assert {candidate for candidate, engine in made.items() if engine()} == {ONE, SCRIPT_ALONE}


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


def test_a_real_measurement_gives_a_choice_whose_answers_are_right(artefact, tmp_path, monkeypatch):
    monkeypatch.setattr(Others, "are_busy", lambda others, processors: False)
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
