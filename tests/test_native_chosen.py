"""Engines on our own kernels among others: where they are tried, how exact they must be, what is said without them."""

import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from native_cases import ENGINES, Case, case_of
from test_engine_choice import Timed, put_in_place
from test_server_inference import offline

from layercast.models.artefact import NO_TRUST, golden
from layercast.models.manifest import Manifest
from layercast.server import compiled
from layercast.server.engines import inline, source
from layercast.server.engines.base import EngineError
from layercast.server.engines.choice import Candidate
from layercast.server.engines.golden import check_golden
from layercast.server.engines.native.engine import NativeEngine
from layercast.server.engines.source import Source
from layercast.server.loader import LoadError, load
from layercast.server.model import Loaded
from layercast.server.settings import ModelSettings

ONE = Candidate("onnx", 1)
NAMES = ["onnx", "winograd", "encoder", "torchscript", "eager"]
OTHERS = ["onnx", "torchscript", "eager"]


@pytest.fixture(scope="module", params=ENGINES)
def case(request, repository, modules) -> Case:
    return case_of(request.param, repository, modules)


@pytest.fixture(autouse=True)
def look_in(monkeypatch) -> Callable[[Path], None]:
    """Put back afterwards where this process looks for code, which is nowhere until the test says where."""
    monkeypatch.setattr(compiled, "_looked_in", [])
    return compiled.look_in


@pytest.fixture
def timed(monkeypatch) -> Timed:
    return put_in_place(Timed(ONE), monkeypatch)


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    """A model without convolutions or attention."""
    return tiny.write(tmp_path_factory.mktemp("exported"), 1, seed=1, programs=("onnx",))


def loaded(artefact: Path, choices: Path | None = None, threads: int = 2, **settings: Any) -> Loaded:
    return load(artefact, ModelSettings(device="cpu", max_batch=8, **settings), threads, choices=choices)


def candidates(artefact: Path, device: str = "cpu", threads: int = 2, **settings: Any) -> list[Candidate]:
    manifest = Manifest.read(artefact)
    found = Source(artefact, manifest, torch.device(device), threads, NO_TRUST, "", settings.get("precision", "fp32"))
    return found.candidates(ModelSettings(**settings))


def names(found: list[Candidate]) -> list[str]:
    return list(dict.fromkeys(candidate.engine for candidate in found))


def on(engine: str) -> list[Candidate]:
    return [Candidate(engine, 1), Candidate(engine, 2)]  # type: ignore[arg-type]


@pytest.mark.usefixtures("kernels_here")
def test_it_is_tried_after_onnx_with_one_thread_and_with_all(case):
    found = candidates(case.directory)
    assert [name for name in names(found) if name in NAMES] == [
        name for name in NAMES if name in case.manifest.programs or name in ("winograd", "encoder", "eager")
    ]
    assert [candidate for candidate in found if candidate.engine == case.engine] == on(case.engine)
    assert candidates(case.directory, engine=case.engine) == on(case.engine)
    assert candidates(case.directory, threads=1, engine=case.engine) == on(case.engine)[:1]


def test_without_its_kernel_it_is_not_tried_and_asked_for_it_says_why(case):
    assert set(names(candidates(case.directory))) <= set(OTHERS)
    with pytest.raises(EngineError, match=f"engine {case.engine} is asked for, but its kernel is not compiled"):
        candidates(case.directory, engine=case.engine)


@pytest.mark.usefixtures("kernels_here")
def test_it_is_not_tried_on_a_card_in_bf16_or_without_the_program(case, tmp_path):
    assert set(names(candidates(case.directory, device="cuda"))) <= set(OTHERS)
    with pytest.raises(EngineError, match=r"it runs on the CPU; set device = \"cpu\" for this model"):
        candidates(case.directory, device="cuda", engine=case.engine)
    assert names(candidates(case.directory, precision="bf16")) == ["eager"]
    with pytest.raises(ValueError, match=f"precision bf16 is for engine eager, not {case.engine}"):
        ModelSettings(engine=case.engine, precision="bf16")
    without = tiny.write(tmp_path, 1, seed=1, programs=("torchscript",))
    assert names(candidates(without)) == ["torchscript", "eager"]
    with pytest.raises(EngineError, match=f"engine {case.engine} is asked for, but the artefact has no program onnx"):
        candidates(without, engine=case.engine)


@pytest.mark.usefixtures("kernels_here")
def test_a_model_that_it_can_not_run_is_left_to_the_others_quietly(other, case, caplog):
    with caplog.at_level(logging.INFO):
        assert case.engine not in loaded(other).engines
    assert not [record for record in caplog.records if case.engine in record.getMessage()]
    with pytest.raises(LoadError, match=f"engine {case.engine} .*{case.misses}"):
        loaded(other, engine=case.engine)


@pytest.mark.usefixtures("kernels_here")
def test_asked_for_it_has_an_instance_a_processor_where_they_answer_more_and_they_share_it(case, timed):
    one, both = on(case.engine)
    timed.chosen, timed.gain = (one,), 1.9
    served = loaded(case.directory, engine=case.engine)
    assert timed.tried == [[one, both]]
    assert served.engines == f"2 instances: {case.engine} (1 thread)"
    first, second = (runner.fast for runner in served.runners)
    assert first is second
    x = case.inputs(5)
    wanted = offline(case.module, x)
    spec, output = case.manifest.inputs[0].name, case.manifest.outputs[0].name
    np.testing.assert_allclose(first.run({spec: x})[output], wanted, atol=1e-4 * max(1, np.abs(wanted).max()))
    timed.gain, timed.chosen = 0.5, (both,)
    assert loaded(case.directory, engine=case.engine).engines == f"{case.engine} (2 threads)"
    timed.tried.clear()
    assert loaded(case.directory, engine=case.engine, threads=1).engines == f"{case.engine} (1 thread)"
    assert timed.tried == [], "there is nothing to choose"


@pytest.mark.usefixtures("kernels_here")
def test_both_numbers_of_threads_share_what_is_loaded(case):
    manifest = case.manifest
    found = Source(case.directory, manifest, torch.device("cpu"), 2, NO_TRUST, "", "fp32")
    one, both = found.engines(on(case.engine), None).values()
    assert one._part is both._part
    assert one._plan is both._plan
    assert (one._crew.members, both._crew.members) == (1, 2)


@pytest.mark.usefixtures("kernels_here")
def test_short_batches_run_on_the_event_loop(case, monkeypatch):
    """As with ONNX Runtime: what it does can be seen."""
    manifest = case.manifest
    monkeypatch.setattr(inline, "limit", lambda requests: 60.0)
    engine = loaded(case.directory, engine=case.engine, threads=1).runners[0].fast
    assert inline.seen(engine)
    assert inline.may_run_inline(engine, case.directory, manifest)
    lengths = inline.lengths_of(manifest.inputs)
    name = manifest.inputs[0].name
    found = inline.inline_of(
        engine, case.directory, manifest, lambda rows, length: {name: case.inputs(rows, length or 20)}, [1, 2], lengths
    )
    assert all(found.takes(rows, 1, 20) for rows in (1, 2))
    assert not found.takes(3, 1, 20)
    monkeypatch.setattr(inline, "limit", lambda requests: 0.0)
    assert not inline.inline_of(
        engine, case.directory, manifest, lambda rows, length: {name: case.inputs(rows, length or 20)}, [1], lengths
    ).rows


@pytest.mark.usefixtures("kernels_here")
def test_a_choice_is_made_anew_when_the_kernel_goes_and_found_when_it_comes_back(
    case, tmp_path, timed, look_in, kernels_folder
):
    choices = tmp_path / "engines"
    timed.chosen = (on(case.engine)[0],)
    assert loaded(case.directory, choices).engines == f"{case.engine} (1 thread)"
    assert case.engine in names(timed.tried[0])
    look_in(tmp_path / "absent")
    timed.chosen = (ONE,)
    assert loaded(case.directory, choices).engines == "onnx (1 thread)"
    assert case.engine not in names(timed.tried[1])
    look_in(kernels_folder)
    assert loaded(case.directory, choices).engines == f"{case.engine} (1 thread)"
    assert len(timed.tried) == 2


class Coarse(NativeEngine[None]):
    """Stands for an engine on weights with which it is `error` off."""

    error = 0.0
    _load = _memory = _compute = None

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self.name, self.device = self.standing_for, "cpu"
        self._free = []
        self._outputs = golden(directory, manifest).outputs

    def with_threads(self, threads: int) -> "Coarse":
        return self

    def run(self, inputs: Any) -> Any:
        rows = len(next(iter(inputs.values())))
        return {name: np.resize(array, (rows, *array.shape[1:])) + self.error for name, array in self._outputs.items()}


@pytest.fixture(params=ENGINES)
def coarse(request, monkeypatch) -> type[Coarse]:
    monkeypatch.setattr(source, "why_not", lambda name: "" if name == request.param else "not here")
    monkeypatch.setattr(source, f"{request.param.title()}Engine", Coarse)
    monkeypatch.setattr(Coarse, "standing_for", request.param, raising=False)
    monkeypatch.setattr(Coarse, "error", np.float32(5e-4))
    return Coarse


def test_what_is_less_exact_is_left_out_with_the_reason_and_asked_for_an_error(other, coarse, timed, caplog):
    name = coarse.standing_for
    assert loaded(other).engines == "onnx (1 thread)"
    assert name not in names(timed.tried[0])
    reason = f"engine {name}, output 'output' differs by up to 0.0005.* from what the export recorded"
    lines = [record for record in caplog.records if name in record.getMessage()]
    assert {line.levelno for line in lines} == {logging.WARNING}
    with pytest.raises(LoadError, match=reason + "; its weights need another engine") as raised:
        loaded(other, engine=name)
    assert all(str(raised.value) in line.getMessage() for line in lines)


def test_one_that_was_chosen_and_is_less_exact_now_is_timed_and_left_out(other, tmp_path, coarse, timed, monkeypatch):
    name = coarse.standing_for
    monkeypatch.setattr(coarse, "error", np.float32(0))
    timed.chosen = (on(name)[0],)
    assert loaded(other, tmp_path).engines == f"{name} (1 thread)"
    monkeypatch.setattr(coarse, "error", np.float32(5e-4))
    timed.chosen = (ONE,)
    assert loaded(other, tmp_path).engines == "onnx (1 thread)"
    assert name not in names(timed.tried[1])


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize(("largest", "error", "fits"), [(0.5, 0.9e-4, True), (0.5, 1.1e-4, False),
                                                        (20, 19e-4, True), (20, 21e-4, False)])  # fmt: skip
def test_it_must_be_within_a_ten_thousandth_of_the_largest_value_or_of_one(name, largest, error, fits):
    wanted = np.float32([[0.0, largest]])
    recorded: Any = SimpleNamespace(inputs={}, outputs={"y": wanted})
    manifest: Any = SimpleNamespace(int8=None)
    off = wanted + np.float32([[error, 0]])
    engine: Any = SimpleNamespace(name=name, run=lambda inputs: {"y": off})
    if fits:
        check_golden(engine, recorded, manifest)
    else:
        with pytest.raises(EngineError, match="its weights need another engine"):
            check_golden(engine, recorded, manifest)


def test_others_may_differ_by_ten_times_as_much():
    wanted = np.float32([[0.0, 0.5]])
    recorded: Any = SimpleNamespace(inputs={}, outputs={"y": wanted})
    engine: Any = SimpleNamespace(name="onnx", run=lambda inputs: {"y": wanted + np.float32(9e-4)})
    check_golden(engine, recorded, SimpleNamespace(int8=None))
