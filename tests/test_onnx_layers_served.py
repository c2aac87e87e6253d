"""Versions whose layers are read from the ONNX program, loaded and served: old ones, foreign ones, ones that lie."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx_layers import close, hooks, note_parts, untrusted
from serving import running
from test_server_features import arrays, extract
from test_server_inference import rows_for
from tiny import edit_manifest

from layercast.server.engines.eager import EagerEngine
from layercast.server.engines.tapped import TappedEngine
from layercast.server.loader import load
from layercast.server.settings import ModelSettings
from layercast.server.work import Tap


@pytest.fixture(scope="module")
def directories(repository) -> dict[str, Path]:
    return {name: repository / name / "1" for name in ("resnet", "transformer", "shared")}


def test_an_older_manifest_loads_and_its_layers_are_read_by_hooks(directories, tmp_path):
    directory = shutil.copytree(directories["shared"], tmp_path / "shared" / "1")

    def age(manifest: dict) -> None:
        assert manifest.pop("onnx_values")
        manifest["schema_version"] = 1

    edit_manifest(directory, age)
    assert isinstance(load(directory, ModelSettings(), 1).runner.taps, EagerEngine)
    assert isinstance(load(directories["shared"], ModelSettings(), 1).runner.taps, TappedEngine)
    assert isinstance(load(directories["shared"], ModelSettings(engine="eager"), 1).runner.taps, EagerEngine)


def test_a_server_counts_what_read_the_layers_of_a_batch(served, modules):
    def count() -> float:
        of = served.server.metrics.feature_batches
        return sum(of.labels("mnist", "1", engine).value for engine in ("eager", "onnx"))

    def early() -> float:
        samples = served.server.metrics.early_exits.labels("mnist", "1").samples()
        return next(value for name, _, value in samples if name == "_count")

    before, stopped, x = count(), early(), rows_for("mnist", 4)
    for _ in range(20):
        got = arrays(extract(served, "mnist", x, ["net.0", "net.2@norm"]).layers)
    assert count() == before + 20
    assert early() == stopped + 20, "whichever way they are read"
    with torch.inference_mode():
        inside = modules["mnist"].net[0](torch.from_numpy(x).flatten(1)).numpy()
    np.testing.assert_allclose(got["net.0"], inside, atol=1e-4)


def test_layers_of_a_module_that_is_not_built_come_from_the_program(directories, tmp_path):
    untrusted(directories["transformer"], tmp_path)
    x = rows_for("transformer", 3, 20)
    with running(tmp_path) as server:
        for taps in (["blocks.0@mean", "blocks.1@last"], ["norm"]):
            got = arrays(extract(server, "transformer", x, taps).layers)
            for _ in range(8):
                close(arrays(extract(server, "transformer", x, taps).layers), got)
            wanted = hooks(directories["transformer"]).tapped(
                {"tokens": x}, [Tap(*tap.split("@")) for tap in taps], False
            )
            close({tap: got[tap] for tap in taps}, dict(zip(taps, wanted[1].values(), strict=True)))
        layers = {layer.path: layer for layer in server.server.repository.find("transformer", "").manifest.layers}
        assert "--trust elsewhere:Net" in layers["blocks.0.attn.weights"].reason
        assert layers["blocks.0"].available


@pytest.mark.parametrize(
    ("settings", "cut_for"),
    [
        ({"features": "false"}, []),
        ({"feature_layers": ("layer1.0",)}, [{"layer1.0"}]),
        ({"feature_layers": ("layer1.0.conv1",)}, []),  # which has no value in the program
    ],
)
def test_nothing_is_compiled_for_layers_that_the_settings_keep_back(
    directories, tmp_path, monkeypatch, settings, cut_for
):
    compiled = note_parts(monkeypatch)
    loaded = load(untrusted(directories["resnet"], tmp_path), ModelSettings(**settings), 1)
    assert compiled == cut_for
    assert [layer.path for layer in loaded.manifest.layers if layer.available] == [
        path for layers in cut_for for path in layers
    ]
    assert (loaded.runner.taps is None) == (not cut_for)


def test_a_manifest_that_names_values_of_other_shapes_gets_no_layers(directories, tmp_path):
    directory = untrusted(directories["resnet"], tmp_path)
    edit_manifest(directory, lambda manifest: manifest["onnx_values"].update(layer1=manifest["onnx_values"]["layer2"]))
    loaded = load(directory, ModelSettings(), 1)
    assert loaded.runner.taps is None
    assert loaded.note.startswith("layers are not available: ")
    assert not any(layer.available for layer in loaded.manifest.layers)
