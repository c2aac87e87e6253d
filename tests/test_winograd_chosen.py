"""The engine winograd among the others: where it is tried, what it must be as near as, and what is said without it."""

import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import compiled_kernels
import numpy as np
import pytest
import tiny
import torch
from test_engine_choice import Timed, put_in_place
from test_server_inference import offline, rows_for

from layercast.models.artefact import NO_TRUST, golden
from layercast.models.manifest import Manifest
from layercast.server import compiled
from layercast.server.engines import source
from layercast.server.engines.base import EngineError
from layercast.server.engines.choice import Candidate
from layercast.server.engines.golden import check_golden
from layercast.server.engines.source import Source
from layercast.server.loader import LoadError, load
from layercast.server.model import Loaded
from layercast.server.settings import ModelSettings

WINOGRAD, ONE = Candidate("winograd", 1), Candidate("onnx", 1)
NAMES = ["onnx", "winograd", "torchscript", "eager"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("kernels")
    compiled_kernels.make(output)
    return output


@pytest.fixture(autouse=True)
def look_in(monkeypatch) -> Callable[[Path], None]:
    """Put back afterwards where this process looks for code, which is nowhere until the test says where."""
    monkeypatch.setattr(compiled, "_looked_in", [])
    return compiled.look_in


@pytest.fixture
def kernels(look_in, folder) -> None:
    look_in(folder)


@pytest.fixture
def timed(monkeypatch) -> Timed:
    return put_in_place(Timed(WINOGRAD), monkeypatch)


@pytest.fixture
def resnet(repository) -> Path:
    return repository / "resnet" / "1"


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    """A model without convolutions."""
    return tiny.write(tmp_path_factory.mktemp("exported"), 1, seed=1, programs=("onnx",))


def loaded(artefact: Path, choices: Path | None = None, threads: int = 2, **settings: Any) -> Loaded:
    return load(artefact, ModelSettings(device="cpu", max_batch=8, **settings), threads, choices=choices)


def candidates(artefact: Path, device: str = "cpu", threads: int = 2, **settings: Any) -> list[Candidate]:
    manifest = Manifest.read(artefact)
    found = Source(artefact, manifest, torch.device(device), threads, NO_TRUST, "", settings.get("precision", "fp32"))
    return found.candidates(ModelSettings(**settings))


def names(found: list[Candidate]) -> list[str]:
    return list(dict.fromkeys(candidate.engine for candidate in found))


@pytest.mark.usefixtures("kernels")
def test_it_is_tried_after_onnx_with_one_thread(resnet):
    assert names(candidates(resnet)) == NAMES
    assert [candidate.threads for candidate in candidates(resnet) if candidate.engine == "winograd"] == [1]
    assert candidates(resnet, engine="winograd") == [WINOGRAD]


def test_without_its_kernel_it_is_not_tried_and_asked_for_it_says_why(resnet):
    assert names(candidates(resnet)) == [name for name in NAMES if name != "winograd"]
    with pytest.raises(EngineError, match="engine winograd is asked for, but its kernel is not compiled"):
        candidates(resnet, engine="winograd")


@pytest.mark.usefixtures("kernels")
def test_it_is_not_tried_on_a_card_in_bf16_or_without_the_program(resnet, modules, tmp_path):
    assert "winograd" not in names(candidates(resnet, device="cuda"))
    with pytest.raises(EngineError, match=r"it runs on the CPU; set device = \"cpu\" for this model"):
        candidates(resnet, device="cuda", engine="winograd")
    assert names(candidates(resnet, precision="bf16")) == ["eager"]
    with pytest.raises(ValueError, match="precision bf16 is for engine eager, not winograd"):
        ModelSettings(engine="winograd", precision="bf16")
    without = tiny.write(tmp_path, 1, seed=1, programs=("torchscript",))
    assert names(candidates(without)) == ["torchscript", "eager"]
    with pytest.raises(EngineError, match="engine winograd is asked for, but the artefact has no program onnx"):
        candidates(without, engine="winograd")


@pytest.mark.usefixtures("kernels")
def test_a_model_that_it_can_not_run_is_left_to_the_others_quietly(other, caplog):
    with caplog.at_level(logging.INFO):
        assert "winograd" not in loaded(other).engines
    assert not [record for record in caplog.records if "winograd" in record.getMessage()]
    with pytest.raises(LoadError, match="engine winograd .*convolution"):
        loaded(other, engine="winograd")


@pytest.mark.usefixtures("kernels")
def test_asked_for_it_has_an_instance_a_processor_where_they_answer_more_and_they_share_it(resnet, modules, timed):
    timed.gain = 1.9
    served = loaded(resnet, engine="winograd")
    assert timed.tried == [[WINOGRAD]]
    assert served.engines == "2 instances: winograd (1 thread)"
    one, two = (runner.fast for runner in served.runners)
    assert one is two
    x = rows_for("resnet", 5)
    wanted = offline(modules["resnet"], x)
    np.testing.assert_allclose(one.run({"image": x})["logits"], wanted, atol=1e-4 * max(1, np.abs(wanted).max()))
    timed.gain = 0.5
    assert loaded(resnet, engine="winograd").engines == "winograd (1 thread)"
    timed.tried.clear()
    assert loaded(resnet, engine="winograd", instances=2).engines == "2 instances: winograd (1 thread)"
    assert loaded(resnet, engine="winograd", threads=1).engines == "winograd (1 thread)"
    assert timed.tried == [], "there is nothing to choose"


@pytest.mark.usefixtures("kernels")
def test_a_choice_is_made_anew_when_the_kernel_goes_and_found_when_it_comes_back(
    resnet, tmp_path, timed, look_in, folder
):
    choices = tmp_path / "engines"
    assert loaded(resnet, choices).engines == "winograd (1 thread)"
    assert names(timed.tried[0]) == NAMES
    look_in(tmp_path / "absent")
    timed.chosen = (ONE,)
    assert loaded(resnet, choices).engines == "onnx (1 thread)"
    assert "winograd" not in names(timed.tried[1])
    look_in(folder)
    assert loaded(resnet, choices).engines == "winograd (1 thread)"
    assert len(timed.tried) == 2


class Coarse:
    """Stands for the engine on weights with which it is `error` off."""

    name, device = "winograd", "cpu"
    error = 0.0

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self._outputs = golden(directory, manifest).outputs

    def run(self, inputs: Any) -> Any:
        rows = len(next(iter(inputs.values())))
        return {name: np.resize(array, (rows, *array.shape[1:])) + self.error for name, array in self._outputs.items()}


@pytest.fixture
def coarse(monkeypatch) -> type[Coarse]:
    monkeypatch.setattr(source.library, "why_not", lambda: "")
    monkeypatch.setattr(source, "WinogradEngine", Coarse)
    monkeypatch.setattr(Coarse, "error", np.float32(5e-4))
    return Coarse


def test_what_is_less_exact_is_left_out_with_the_reason_and_asked_for_an_error(other, coarse, timed, caplog):
    timed.chosen = (ONE,)
    assert loaded(other).engines == "onnx (1 thread)"
    assert "winograd" not in names(timed.tried[0])
    reason = "engine winograd, output 'output' differs by up to 0.0005.* from what the export recorded"
    (line,) = [record for record in caplog.records if "winograd" in record.getMessage()]
    assert line.levelno == logging.WARNING
    with pytest.raises(LoadError, match=reason + "; its weights need another engine") as raised:
        loaded(other, engine="winograd")
    assert str(raised.value) in line.getMessage()


def test_one_that_was_chosen_and_is_less_exact_now_is_timed_and_left_out(other, tmp_path, coarse, timed, monkeypatch):
    monkeypatch.setattr(coarse, "error", np.float32(0))
    assert loaded(other, tmp_path).engines == "winograd (1 thread)"
    monkeypatch.setattr(coarse, "error", np.float32(5e-4))
    timed.chosen = (ONE,)
    assert loaded(other, tmp_path).engines == "onnx (1 thread)"
    assert "winograd" not in names(timed.tried[1])


@pytest.mark.parametrize(("largest", "error", "fits"), [(0.5, 0.9e-4, True), (0.5, 1.1e-4, False),
                                                        (20, 19e-4, True), (20, 21e-4, False)])  # fmt: skip
def test_it_must_be_within_a_ten_thousandth_of_the_largest_value_or_of_one(largest, error, fits):
    wanted = np.float32([[0.0, largest]])
    recorded: Any = SimpleNamespace(inputs={}, outputs={"y": wanted})
    manifest: Any = SimpleNamespace(int8=None)
    off = wanted + np.float32([[error, 0]])
    engine: Any = SimpleNamespace(name="winograd", run=lambda inputs: {"y": off})
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
