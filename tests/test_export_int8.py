"""The int8 program: made from calibration rows, its cost in the manifest, served only when asked for."""

import json
import shutil

import numpy as np
import onnx
import pytest
import torch
from conftest import card_of
from serving import running

from layercast.client import Client
from layercast.client.main import main
from layercast.models import zoo
from layercast.models.artefact import module_from_card
from layercast.models.card import Card
from layercast.models.export.calibration import Calibration, CalibrationError
from layercast.models.export.writer import export_artefact
from layercast.models.manifest import Manifest, ManifestError
from layercast.models.onnx_runtime import onnxruntime
from layercast.server.engines.base import EngineError
from layercast.server.engines.onnx import OnnxEngine
from layercast.server.loader import LoadError, load
from layercast.server.settings import ModelSettings

ROWS = 120


def strokes(count: int) -> np.ndarray:
    """Pictures with some bright bars on black, which is nearer to digits than noise is."""
    generator = np.random.default_rng(5)
    images = np.zeros((count, 1, 28, 28), np.float32)
    for image in images:
        for _ in range(3):
            top, left = generator.integers(3, 20, 2)
            height, width = ((12, 3), (3, 12))[generator.integers(2)]
            image[0, top : top + height, left : left + width] = generator.uniform(0.6, 1)
    return images


def by_torch(images: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return module_from_card(zoo.directory("mnist"))(torch.from_numpy(images)).numpy()


def by_int8(directory, images: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(directory / "model.int8.onnx", providers=["CPUExecutionProvider"])
    return session.run(None, {"image": images})[0]


@pytest.fixture(scope="module")
def quantised(tmp_path_factory):
    """The zoo's mnist, exported by the command; its targets are what torch answers."""
    root = tmp_path_factory.mktemp("int8")
    images = strokes(ROWS)
    np.savez(root / "rows.npz", image=images, targets=by_torch(images).argmax(-1))
    code = main(
        [
            "export",
            "mnist",
            "--output",
            str(root / "models"),
            "--quantize",
            "int8",
            "--calibration",
            str(root / "rows.npz"),
        ]
    )
    assert code == 0
    return root / "models" / "mnist" / "1"


def test_the_manifest_tells_what_int8_costs_on_rows_held_out(quantised):
    manifest = Manifest.read(quantised)
    manifest.verify_files(quantised)
    assert manifest.programs["onnx-int8"] == "model.int8.onnx"
    held_out = strokes(ROWS)[3::4]
    wanted, got = by_torch(held_out), by_int8(quantised, held_out)
    cost = manifest.int8
    assert (cost.method, cost.data, cost.calibration_rows, cost.measured_rows) == ("static", "rows.npz", 90, 30)
    assert cost.largest_difference == pytest.approx(np.abs(got - wanted).max(), abs=1e-4)
    assert cost.mean_difference == pytest.approx(np.abs(got - wanted).mean(), abs=1e-4)
    assert cost.largest_difference > 1e-3, "int8 is not float32"
    same = (got.argmax(-1) == wanted.argmax(-1)).mean()
    assert cost.agreement == pytest.approx(same)
    assert cost.accuracy == {"onnx": 1.0, "onnx-int8": pytest.approx(same)}
    assert cost.agreement >= 0.9


def test_the_int8_program_is_smaller_and_takes_any_batch(quantised):
    assert (quantised / "model.int8.onnx").stat().st_size < (quantised / "model.onnx").stat().st_size / 3
    kinds = {i.data_type for i in onnx.load(quantised / "model.int8.onnx").graph.initializer}
    assert onnx.TensorProto.INT8 in kinds
    images = strokes(65)
    together = by_int8(quantised, images)
    for rows in (1, 3):
        np.testing.assert_allclose(by_int8(quantised, images[:rows]), together[:rows], atol=1e-5)


def test_a_server_runs_int8_when_the_models_owner_asks_for_it(quantised, caplog):
    settings = quantised.parent / "layercast.toml"
    images = strokes(33)
    settings.write_text('engine = "onnx-int8"\n')
    try:
        with running(quantised.parents[1]) as server, Client(server.url) as client:
            got = client.predict("mnist", images)
            features = client.features("mnist", images[:1], "net.4")["net.4"]
    finally:
        settings.unlink()
    wanted = by_torch(images)
    np.testing.assert_allclose(got, by_int8(quantised, images), atol=1e-5)
    assert np.abs(got - wanted).max() > 1e-3
    assert (got.argmax(-1) == wanted.argmax(-1)).mean() >= 0.9
    np.testing.assert_allclose(features, wanted[:1], atol=1e-4)


@pytest.mark.parametrize("allowed", [False, True])
def test_auto_tries_int8_only_where_the_models_owner_allows_it(quantised, caplog, allowed):
    caplog.set_level("INFO", "layercast.server.engines")
    loaded = load(quantised, ModelSettings(engine="auto", device="cpu", allow_int8=allowed), threads=1)
    assert allowed or loaded.runner.fast.name != "onnx-int8"
    tried = caplog.text.partition("measured ")[2]
    assert "onnx (1 thread)" in tried
    assert ("onnx-int8 (1 thread)" in tried) == allowed


def test_an_int8_program_that_answers_otherwise_than_at_the_export_is_not_served(quantised, tmp_path):
    directory = tmp_path / "mnist" / "1"
    shutil.copytree(quantised, directory)
    content = json.loads((directory / "manifest.json").read_text())
    content["int8"]["tolerance"] = 1e-6
    (directory / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(LoadError, match="engine onnx-int8, output 'logits' differs by"):
        load(directory, ModelSettings(engine="onnx-int8", device="cpu"), threads=1)


def test_int8_that_is_not_there_or_not_for_this_device_is_refused(quantised, repository):
    with pytest.raises(LoadError, match="engine onnx-int8 is asked for, but the artefact has no such program"):
        load(repository / "mnist" / "1", ModelSettings(engine="onnx-int8", device="cpu"), threads=1)
    with pytest.raises(EngineError, match="runs on the CPU; set device"):
        OnnxEngine(quantised, Manifest.read(quantised), torch.device("cuda"), 1, "onnx-int8")


def test_transformers_are_quantised_dynamically_and_keep_any_length(tmp_path, modules):
    tokens = np.random.default_rng(2).integers(0, 257, (40, 20))
    calibration = Calibration("noise", {"tokens": tokens[:8]}, {"tokens": tokens[8:]})
    directory = tmp_path / "transformer" / "1"
    manifest = export_artefact(
        modules["transformer"], card_of("transformer"), directory, programs=("onnx",), calibration=calibration
    )
    assert (manifest.int8.method, manifest.int8.calibration_rows, manifest.int8.accuracy) == ("dynamic", 0, {})
    with torch.inference_mode():
        wanted = modules["transformer"](torch.from_numpy(tokens[8:])).numpy()
    assert 0 < manifest.int8.mean_difference < 0.1 * wanted.std()
    session = onnxruntime.InferenceSession(directory / "model.int8.onnx", providers=["CPUExecutionProvider"])
    for rows, length in ((1, 1), (4, 17), (2, 32)):
        assert session.run(None, {"tokens": tokens[:rows, :1].repeat(length, 1)})[0].shape == (rows, 2)


def test_the_zoos_digits_lose_next_to_nothing(data_directory, tmp_path, capsys):
    code = main(["export", "mnist", "--output", str(tmp_path), "--quantize", "int8", "--data", str(data_directory)])
    cost = Manifest.read(tmp_path / "mnist" / "1").int8
    assert code == 0
    assert (cost.calibration_rows, cost.measured_rows) == (256, 2000)
    assert cost.accuracy["onnx"] > 0.98
    assert abs(cost.accuracy["onnx"] - cost.accuracy["onnx-int8"]) <= 0.005
    assert cost.agreement >= 0.995
    shown = capsys.readouterr().out
    assert f"accuracy {cost.accuracy['onnx']:.2%} -> {cost.accuracy['onnx-int8']:.2%} on 2,000 rows" in shown


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"picture": strokes(8)}, "want the arrays ['image'], got ['picture']"),
        ({"image": strokes(8)[:, 0]}, "image: want float32 [-1, 1, 28, 28] (-1: any size), got float32 [8, 28, 28]"),
        ({"image": strokes(8).astype(complex)}, "got complex128 [8, 1, 28, 28]"),
        ({"image": strokes(7)}, "want at least 8 rows"),
        ({"image": strokes(9), "targets": np.arange(8)}, "want as many rows in every array, got {'image': 9, 'targets': 8}"),
        ({"image": strokes(8), "targets": np.zeros(8)}, "targets: want whole numbers [N], got float64 [8]"),
        ({"image": np.array([None] * 8)}, "want a file of numpy.savez"),
        (None, "No such file"),
    ],
)  # fmt: skip
def test_calibration_rows_that_do_not_fit_are_refused(tmp_path, capsys, arrays, message):
    path = tmp_path / "rows.npz"
    if arrays is not None:
        np.savez(path, **arrays)
    code = main(
        ["export", "mnist", "--output", str(tmp_path / "out"), "--quantize", "int8", "--calibration", str(path)]
    )
    assert code == 1
    told = capsys.readouterr().err
    assert message in told
    assert "rows.npz" in told
    assert not (tmp_path / "out" / "mnist" / "1").exists()


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (np.full((8, 20), 257), r"tokens: want \[0.0, 256.0\], got values from 257 to 257"),
        (np.zeros((8, 33), int), r"tokens: want at most 32 long, got \[8, 33\]"),
        (np.zeros((8, 20)), r"tokens: want int64 \[-1, -1\] .* got float64 \[8, 20\]"),
    ],
)
def test_tokens_that_the_model_cannot_take_are_refused(tmp_path, tokens, message):
    np.savez(tmp_path / "rows.npz", tokens=tokens)
    with pytest.raises(CalibrationError, match=message):
        Calibration.from_npz(tmp_path / "rows.npz", Card.check(card_of("transformer")).inputs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--quantize", "int8"], "wants rows to calibrate on: --data DIR or --calibration FILE.npz"),
        (["--data", "."], "go with --quantize int8"),
        (["--quantize", "int8", "--data", ".", "--calibration", "x.npz"], "not allowed with"),
        (["--quantize", "int4", "--data", "."], "invalid choice"),
    ],
)
def test_options_that_contradict_each_other_are_refused(tmp_path, capsys, arguments, message):
    assert main(["export", "mnist", "--output", str(tmp_path), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_figures_and_program_of_int8_go_together(quantised, tmp_path):
    content = json.loads((quantised / "manifest.json").read_text())
    del content["int8"]
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(ManifestError, match="int8: want its figures with a program onnx-int8"):
        Manifest.read(tmp_path)
    del content["programs"]["onnx-int8"], content["opsets"]
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    assert Manifest.read(tmp_path).int8 is None, "manifests of before int8 can still be read"
