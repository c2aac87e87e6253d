"""Which instance runs on which card, in which precision; nothing of CUDA where there is none."""

import subprocess
import sys

import numpy as np
import pytest
import tiny
import torch
from conftest import card_of
from fake_card import use
from serving import running
from test_server_inference import offline, rows_for

from layercast.models.export.writer import export_artefact
from layercast.models.hooks import FeatureExtractor
from layercast.proto.messages import ModelConfigRequest
from layercast.server.engines import cuda
from layercast.server.engines.golden import Tolerance
from layercast.server.errors import StartError
from layercast.server.loader import LoadError, choose_devices, load
from layercast.server.settings import ModelSettings, read
from layercast.server.work import Tap


@pytest.fixture(scope="module")
def artefact(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("exported"), 1, seed=1)


@pytest.mark.parametrize(
    ("name", "cards", "placed"),
    [
        ("cpu", 2, ["cpu"] * 3),
        ("auto", 0, ["cpu"] * 3),
        ("auto", 1, ["cuda:0"] * 3),
        ("cuda", 2, ["cuda:0", "cuda:1", "cuda:0"]),
        ("cuda", 8, ["cuda:0", "cuda:1", "cuda:2"]),
        ("cuda:1", 2, ["cuda:1"] * 3),
    ],
)
def test_instances_take_the_cards_in_turn(name, cards, placed):
    with use(cards):
        assert list(map(str, choose_devices(name, 3))) == placed


@pytest.mark.parametrize(
    ("name", "cards", "why"),
    [
        ("cuda", 0, "device is set to cuda, but torch finds no CUDA device here; set it to auto or cpu"),
        ("cuda:0", 0, "device is set to cuda:0, but torch finds no CUDA device here; set it to auto or cpu"),
        ("cuda:1", 1, "device is set to cuda:1, but torch finds only cuda:0 here; set it to one of these"),
        ("cuda:7", 2, "device is set to cuda:7, but torch finds only cuda:0 to cuda:1 here; set it to one of these"),
    ],
)
def test_a_card_that_is_not_there_is_refused(artefact, name, cards, why):
    with use(cards), pytest.raises(LoadError) as raised:
        load(artefact, ModelSettings(device=name), 1)
    assert str(raised.value) == why


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:01", "cuda:-1", "cuda:x", "CUDA", ""])
def test_a_device_of_another_name_is_no_setting(name):
    with pytest.raises(StartError, match="device: String should match pattern"):
        read({"device": name})


def test_a_server_shows_the_cards_and_answers_from_every_one(tmp_path):
    tiny.write(tmp_path, 1, seed=1)
    with use(2) as made, running(tmp_path, device="cuda", instances=3, max_batch=4) as server:
        config = server.call("ModelConfig", ModelConfigRequest(name="tiny")).config
        (group,) = config.instance_group
        assert (group.kind, group.count, list(group.gpus)) == (group.KIND_GPU, 3, [0, 1])
        assert [card.index for card in made] == [0, 1, 0]
        for _ in range(4):
            np.testing.assert_allclose(tiny.answered(server), tiny.expected(1), atol=1e-5)
        (model,) = (version.model for version in server.server.repository.versions())
        for runner in model.loaded.runners:
            np.testing.assert_allclose(runner.fast.run({"x": tiny.ROWS})["output"], tiny.expected(1), atol=1e-5)


def test_bf16_answers_nearly_the_same_and_says_what_it_is(modules, tmp_path):
    export_artefact(modules["resnet"], card_of("resnet"), tmp_path / "1", programs=("torchscript",))
    runner = load(tmp_path / "1", ModelSettings(device="cpu", precision="bf16", max_batch=2), 1).runner
    assert runner.fast is runner.eager
    x = rows_for("resnet", 2)
    got, wanted = runner.fast.run({"image": x})["logits"], offline(modules["resnet"], x)
    assert got.dtype == np.float32
    assert not np.allclose(got, wanted, rtol=1e-5, atol=1e-6)
    assert Tolerance("bf16").close(got, wanted)
    outputs, features = runner.eager.tapped({"image": x}, [Tap("layer1", "mean")], predict=True)
    np.testing.assert_array_equal(outputs["logits"], got)
    with torch.inference_mode(), FeatureExtractor(modules["resnet"], ["layer1@mean"]) as extractor:
        (exact,) = extractor.run(torch.from_numpy(x)).features.values()
    assert features[Tap("layer1", "mean")].dtype == np.float32
    assert Tolerance("bf16").close(features[Tap("layer1", "mean")], exact.numpy())


def test_bf16_runs_through_graphs_too(artefact):
    with use():
        runner = load(artefact, ModelSettings(device="cuda", precision="bf16", max_batch=4), 1).runner
        got = runner.fast.run({"x": tiny.ROWS})["output"]
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        wanted = tiny.module(1)(torch.from_numpy(tiny.ROWS.copy())).float().numpy()
    np.testing.assert_allclose(got, wanted, atol=1e-6)


def test_a_wrong_bf16_answer_is_refused_at_the_load(artefact, tmp_path, monkeypatch):
    from layercast.server.engines import golden

    monkeypatch.setattr(golden, "_BF16", 1e-6)
    monkeypatch.setattr(golden, "_TOLERANCE", 1e-6)
    with pytest.raises(LoadError, match="engine eager, output 'output' differs by up to .* from what the export"):
        load(artefact, ModelSettings(device="cpu", precision="bf16"), 1)


def test_bf16_with_another_engine_is_refused_at_the_start():
    with pytest.raises(StartError, match="precision bf16 is for engine eager, not onnx; leave one of them out"):
        read({"precision": "bf16", "engine": "onnx"})


def test_a_server_on_the_cpu_never_touches_cuda(tmp_path):
    tiny.write(tmp_path, 1, seed=1)
    code = f"""
import torch
from pathlib import Path

def touched(*args, **kwargs):
    raise AssertionError("CUDA was touched")

for name in ("is_available", "device_count", "Stream", "Event", "synchronize", "empty_cache", "CUDAGraph", "_lazy_init"):
    setattr(torch.cuda, name, touched)
from layercast.server.loader import load
from layercast.server.settings import ModelSettings
load(Path({str(tmp_path / "tiny" / "1")!r}), ModelSettings(device="cpu"), 1)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_this_machines_cards_are_counted():
    assert cuda.count() == (torch.cuda.device_count() if torch.cuda.is_available() else 0)
