"""Export: what an artefact holds, and what is refused with the module's name."""

import json

import numpy as np
import onnx
import pytest
import torch
from conftest import card_of
from torch import nn

from layercast.models.artefact import ArtefactError, assert_eval, golden, load_module
from layercast.models.export import exported, torchscript
from layercast.models.export.checks import ExportError
from layercast.models.export.writer import export_artefact
from layercast.models.hooks import registered_hooks
from layercast.models.manifest import Manifest, ManifestError
from layercast.models.onnx_runtime import onnxruntime


@pytest.mark.parametrize("name", ["mnist", "resnet", "transformer", "shared"])
def test_an_artefact_holds_every_program_and_its_parity(repository, modules, name):
    directory = repository / name / "1"
    manifest = Manifest.read(directory)
    manifest.verify_files(directory)
    assert {path.name for path in directory.iterdir()} == {*manifest.files, "manifest.json"}
    assert not any(tensor.external_data for tensor in onnx.load(directory / "model.onnx").graph.initializer)
    assert set(manifest.programs) == {"torchscript", "onnx", "exported"}
    for program in manifest.programs:
        assert set(manifest.parity[program]) == {1, 2, 5, 32}
        assert max(manifest.parity[program].values()) <= 1e-4
    recorded = golden(directory, manifest)
    with torch.inference_mode():
        wanted = modules[name](*(torch.from_numpy(values) for values in recorded.inputs.values())).numpy()
    np.testing.assert_allclose(next(iter(recorded.outputs.values())), wanted, atol=1e-6)


def onnx_program(directory, manifest):
    session = onnxruntime.InferenceSession(directory / "model.onnx", providers=["CPUExecutionProvider"])
    return lambda tokens: torch.from_numpy(session.run(None, {"tokens": tokens.numpy()})[0])


@pytest.mark.parametrize("load", [onnx_program, torchscript.load, exported.load])
@pytest.mark.parametrize("padded", [False, True])
def test_every_program_takes_any_batch_and_any_length(repository, modules, load, padded):
    directory = repository / "transformer" / "1"
    program = load(directory, Manifest.read(directory))
    for rows, length in ((1, 10), (4, 10), (4, 17), (1, 1), (7, 32)):
        tokens = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (rows, length)))
        if padded:
            tokens[:, (length + 1) // 2 :] = 256
        with torch.inference_mode():
            torch.testing.assert_close(program(tokens), modules["transformer"](tokens), atol=1e-4, rtol=0)


def test_a_loaded_module_is_the_exported_one(repository, modules):
    manifest = Manifest.read(repository / "shared" / "1")
    module = load_module(repository / "shared" / "1", manifest)
    assert_eval(module)
    x = torch.rand(3, 10)
    with torch.inference_mode():
        assert torch.equal(module(x), modules["shared"](x))
    assert sum(p.numel() for p in module.parameters()) == 110


def test_the_layer_index_tells_shapes_order_and_in_place_changes(repository):
    layers = {layer.path: layer for layer in Manifest.read(repository / "resnet" / "1").layers}
    assert layers["layer2.0.conv1"].shape == (-1, 128, 16, 16)
    assert layers["bn"].clone, "the ReLU after it works in place"
    assert not layers["relu"].clone
    assert layers["layer2.0.bn2"].clone, "`out += shortcut` changes it"
    assert layers["stem"].order < layers["bn"].order < layers["layer1.0"].order < layers["head"].order
    encoder = {layer.path: layer for layer in Manifest.read(repository / "transformer" / "1").layers}
    assert encoder["blocks.0.attn.weights"].shape == (-1, 2, -1, -1)
    assert not encoder["position"].available
    assert encoder["position"].reason
    shared = [layer.path for layer in Manifest.read(repository / "shared" / "1").layers]
    assert shared == ["shared#0", "relu", "shared#1"]


def export(module, directory, **card):
    return export_artefact(module, {**card_of("shared"), **card}, directory / "m" / "1", programs=("torchscript",))


class Holder(nn.Module):
    """One module between input and output, so that a fault has a path."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, x):
        return self.inside(x)


class Branch(nn.Module):
    def forward(self, x):
        return x * 2 if x.mean() > 0.5 else x - 1


class BatchMean(nn.Module):
    def forward(self, x):
        return x - x.mean(0, keepdim=True)


def test_training_mode_is_refused_by_the_modules_name(tmp_path):
    module = Holder(nn.Sequential(nn.Linear(10, 10), nn.Dropout())).eval()
    module.inside[1].train()
    with pytest.raises(ExportError, match=r"inside\.1.*training mode"):
        export(module, tmp_path)
    with pytest.raises(ArtefactError, match=r"inside\.1"):
        assert_eval(module)
    assert not (tmp_path / "m" / "1").exists()


@pytest.mark.parametrize(
    ("inside", "message"),
    [
        (nn.BatchNorm1d(10, track_running_stats=False), "inside.*running statistics"),
        (BatchMean(), "depends on the other rows.*inside"),
    ],
    ids=["batch norm without statistics", "mixes rows"],
)
def test_what_would_answer_wrongly_is_refused(tmp_path, inside, message):
    with pytest.raises(ExportError, match=message):
        export(Holder(inside).eval(), tmp_path)
    assert list((tmp_path).glob("m/*")) == []


def test_a_branch_that_the_trace_would_freeze_is_refused(tmp_path):
    with pytest.raises(ExportError, match="Branch"):
        export(Branch().eval(), tmp_path, architecture="test_export:Branch")
    assert list((tmp_path).glob("m/*")) == []


def test_a_hook_left_behind_is_refused(tmp_path):
    module = Holder(nn.Linear(10, 10)).eval()
    handle = module.inside.register_forward_hook(lambda *_: None)
    with pytest.raises(ExportError, match="inside.*hook"):
        export(module, tmp_path)
    handle.remove()
    assert registered_hooks(module) == []


def test_a_card_that_contradicts_the_model_is_refused(tmp_path, modules):
    outputs = [{"name": "output", "datatype": "FP32", "shape": [-1, 9]}]
    with pytest.raises(ExportError, match=r"the card says FP32 \[-1, 9\], at batch 1 the model gives FP32 \[1, 10\]"):
        export(modules["shared"], tmp_path, outputs=outputs)
    inputs = [{"name": "y", "datatype": "FP32", "shape": [-1, 10]}]
    with pytest.raises(ExportError, match="the card's inputs are"):
        export(modules["shared"], tmp_path, inputs=inputs)


def test_an_existing_version_is_not_overwritten_unless_forced(tmp_path, modules):
    export(modules["shared"], tmp_path)
    before = (tmp_path / "m" / "1" / "manifest.json").read_bytes()
    with pytest.raises(ExportError, match="exists already"):
        export(modules["shared"], tmp_path)
    assert (tmp_path / "m" / "1" / "manifest.json").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(schema_version=9), "schema_version"),
        (lambda m: m.pop("inputs"), "inputs"),
        (lambda m: m.update(surprise=1), "surprise"),
        (lambda m: m["inputs"][0].update(datatype="FLOAT"), r"inputs\[0\].datatype.*FLOAT"),
        (lambda m: m["inputs"][0].update(shape=[4, 10]), r"inputs\[0\].shape"),
        (lambda m: m["files"].update({"../evil": m["files"]["model.ts"]}), "not a plain file name"),
        (lambda m: m["programs"].update(onnx="elsewhere.onnx"), "elsewhere.onnx"),
    ],
)
def test_a_wrong_manifest_names_the_key(repository, tmp_path, change, message):
    content = json.loads((repository / "shared" / "1" / "manifest.json").read_text())
    change(content)
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(ManifestError, match=message):
        Manifest.read(tmp_path)
