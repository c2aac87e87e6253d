"""Networks that nobody here wrote: exported by the command, served by a process, equal to the original module.

A BERT of Hugging Face from a file, with its weights as a wrapped training script saves them, and MONAI's DenseNet from
the installed package. Once with trust in their code, once without.
"""

import hashlib
import importlib
import json
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from test_server_process import READY, serving
from torch import nn

from layercast.client import Client
from layercast.client.errors import InvalidArgument

HERE = Path(__file__).parent
FREE = ("--grpc-port", "0", "--http-port", "0", "--metrics-port", "0")
DENSENET = "monai.networks.nets:DenseNet121"
DENSENET_ARGUMENTS = {
    "spatial_dims": 2, "in_channels": 3, "out_channels": 5, "init_features": 8, "growth_rate": 4, "block_config": [2, 2],
}  # fmt: skip


@dataclass
class Foreign:
    """A repository of the two models, the modules they came from, and what the exports said."""

    repository: Path
    bert: nn.Module
    densenet: nn.Module
    said: dict[str, str]


def _export(*arguments: str) -> str:
    command = [sys.executable, "-m", "layercast.models.commands.export", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "torchvision" not in done.stderr  # what torch's export says of what it goes without is not the reader's
    return done.stdout


def _originals() -> tuple[nn.Module, nn.Module]:
    """Build both with random weights and statistics, without layercast."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(5)
        bert = importlib.import_module("foreign_bert").tiny(hidden=24)
        densenet = importlib.import_module("monai.networks.nets").DenseNet121(**DENSENET_ARGUMENTS)
    for part in densenet.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.uniform_(-0.2, 0.2)
            part.running_var.uniform_(0.5, 1.5)
    return bert.eval(), densenet.eval()


@pytest.fixture(scope="module")
def foreign(tmp_path_factory) -> Foreign:
    root = tmp_path_factory.mktemp("foreign")
    bert, densenet = _originals()
    wrapped = {f"module._orig_mod.{name}": value for name, value in bert.state_dict().items()}
    torch.save({"epoch": 3, "model_state_dict": wrapped, "optimizer": {"state": {}}}, root / "bert.pth")
    torch.save(densenet.state_dict(), root / "densenet.pt")
    output = ("--output", str(root / "repository"))
    runs = {
        "bert": (
            "--file", f"{HERE / 'foreign_bert.py'}:tiny", "--arguments", '{"hidden": 24}',
            "--weights", str(root / "bert.pth"), "--name", "bert", "--description", "a small BERT",
            # not in the order of forward
            "--example", "token_type_ids:int64[2,T]{0..1}", "--example", "input_ids:torch.int64[2,T<=32]{0..99}",
            "--example", "attention_mask:INT64[N,?]{mask}",
        ),
        "densenet": (
            DENSENET, "--arguments", json.dumps(DENSENET_ARGUMENTS), "--weights", str(root / "densenet.pt"),
            "--name", "densenet", "--example", "x:float32[2,3,32,32]", "--labels", "a,b,c,d,e",
        ),
    }  # fmt: skip
    with ThreadPoolExecutor(2) as pool:
        said = dict(zip(runs, pool.map(lambda run: _export(*run, *output), runs.values()), strict=True))
    return Foreign(root / "repository", bert, densenet, said)


def _texts(rows: int, length: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Texts whose tails are masked, the first one whole."""
    random = np.random.default_rng(seed)
    mask = np.ones((rows, length), "i8")
    for row in range(1, rows):
        mask[row, random.integers(1, length + 1) :] = 0
    shape = (rows, length)
    return {"input_ids": random.integers(0, 100, shape), "attention_mask": mask,
            "token_type_ids": random.integers(0, 2, shape)}  # fmt: skip


def _images(rows: int) -> np.ndarray:
    return np.random.default_rng(rows).random((rows, 3, 32, 32), "f4")


def _offline(module: nn.Module, *inputs: np.ndarray, **named: np.ndarray) -> tuple[object, dict[str, torch.Tensor]]:
    """Return what the original returns, and what every module inside it does, by plain hooks of torch."""
    seen: dict[str, torch.Tensor] = {}

    def keep(path: str):
        def hook(_module, _inputs, output) -> None:
            output = output[0] if isinstance(output, tuple) else output
            if isinstance(output, torch.Tensor):
                seen[path] = output.clone()

        return hook

    handles = [part.register_forward_hook(keep(path)) for path, part in module.named_modules() if path]
    with torch.inference_mode():
        result = module(*map(torch.from_numpy, inputs), **{k: torch.from_numpy(v) for k, v in named.items()})
    for handle in handles:
        handle.remove()
    return result, seen


def _assert_predictions(client: Client, foreign: Foreign) -> None:
    for rows, length in ((1, 7), (5, 20), (3, 32)):
        texts = _texts(rows, length)
        got, (wanted, _) = client.predict("bert", texts), _offline(foreign.bert, **texts)
        assert set(got) == {"last_hidden_state", "pooler_output"}
        for name, values in got.items():
            np.testing.assert_allclose(values, wanted[name].numpy(), atol=1e-4, err_msg=name)
    for rows in (1, 4, 70):  # 70 is more than a batch holds
        got, (wanted, _) = client.predict("densenet", _images(rows)), _offline(foreign.densenet, _images(rows))
        np.testing.assert_allclose(got, wanted.numpy(), atol=1e-4)


def test_the_command_says_what_it_did_and_the_manifest_keeps_it(foreign):
    assert "weights from 'model_state_dict' in bert.pth" in foreign.said["bert"]
    assert "took 'module._orig_mod.' off the names" in foreign.said["bert"]
    assert "torchscript left out: " in foreign.said["bert"], "its mask code branches on values"
    manifest = json.loads((foreign.repository / "bert/1/manifest.json").read_text())
    assert [spec["name"] for spec in manifest["inputs"]] == ["input_ids", "attention_mask", "token_type_ids"]
    assert {spec["max_length"] for spec in manifest["inputs"]} == {32}
    shapes = {spec["name"]: spec["shape"] for spec in manifest["outputs"]}
    assert shapes == {"last_hidden_state": [-1, -1, 24], "pooler_output": [-1, 24]}
    assert (manifest["architecture"], manifest["code"]) == ("foreign_bert.py:tiny", "foreign_bert.py")
    assert (manifest["arguments"], manifest["description"]) == ({"hidden": 24}, "a small BERT")
    source = (HERE / "foreign_bert.py").read_bytes()
    assert manifest["files"]["foreign_bert.py"]["sha256"] == hashlib.sha256(source).hexdigest()
    assert set(manifest["programs"]) == {"onnx", "exported"}
    other = json.loads((foreign.repository / "densenet/1/manifest.json").read_text())
    assert (other["architecture"], other["code"], other["arguments"]) == (DENSENET, "", DENSENET_ARGUMENTS)
    assert other["labels"] == ["a", "b", "c", "d", "e"]
    assert set(other["programs"]) == {"torchscript", "onnx", "exported"}


def test_with_trust_predictions_and_layers_equal_the_original(foreign):
    trust = ("--trust", "artefact-code", "--trust", "monai")
    with serving(foreign.repository, *FREE, *trust) as server:
        port = server.read_until(READY)[1]
        with Client(f"127.0.0.1:{port}") as client:
            _assert_predictions(client, foreign)
            texts = _texts(4, 12)
            _, inside = _offline(foreign.bert, **texts)
            layers = ["embeddings", "encoder.layer.0.intermediate", "encoder.layer.1.output", "pooler.activation"]
            got = client.features("bert", texts, layers)
            for name in layers:
                np.testing.assert_allclose(got[name], inside[name].numpy(), atol=1e-4, err_msg=name)
            means = client.features("bert", texts, ["encoder.layer.0@mean"])["encoder.layer.0@mean"]
            weights = texts["attention_mask"][:, :, None]
            wanted = (inside["encoder.layer.0"].numpy() * weights).sum(1) / weights.sum(1)
            np.testing.assert_allclose(means, wanted, atol=1e-4, err_msg="masked tokens do not count")
            images = _images(3)
            _, inside = _offline(foreign.densenet, images)
            layers = ["features.conv0", "features.denseblock1", "features.transition1", "class_layers.out"]
            got = client.features("densenet", images, layers)
            for name in layers:
                np.testing.assert_allclose(got[name], inside[name].numpy(), atol=1e-4, err_msg=name)
            with pytest.raises(InvalidArgument, match="dimension 1 must be of one size in all inputs"):
                client.predict("bert", texts | {"attention_mask": texts["attention_mask"][:, :5]})
            with ThreadPoolExecutor(8) as pool:  # rows of many callers in one batch
                asked = [_texts(1, 9, seed) for seed in range(16)]
                answers = list(pool.map(lambda text: client.predict("bert", text, outputs="pooler_output"), asked))
            for text, answer in zip(asked, answers, strict=True):
                wanted, _ = _offline(foreign.bert, **text)
                np.testing.assert_allclose(answer, wanted["pooler_output"].numpy(), atol=1e-4)


def test_without_trust_layers_come_from_the_onnx_program_or_are_refused_with_the_fix(foreign):
    with serving(foreign.repository, *FREE) as server:
        port = server.read_until(READY)[1]
        with Client(f"127.0.0.1:{port}") as client:
            _assert_predictions(client, foreign)
            fixes = {"bert": "--trust artefact-code", "densenet": f"--trust {DENSENET}"}
            reasons = {info.name: info.reason for info in client.models()}
            asked = {"bert": _texts(3, 7), "densenet": {"x": _images(3)}}
            originals = {"bert": foreign.bert, "densenet": foreign.densenet}
            for model, fix in fixes.items():
                assert fix in reasons[model]
                layers = client.layers(model)
                _, inside = _offline(originals[model], **asked[model])
                for _ in range(9):  # past the trials, so that parts of the program answer too
                    got = client.features(model, asked[model], ["*"])
                assert got.keys() == {layer.path for layer in layers if layer.available}
                compared = got.keys() & inside.keys()
                assert len(compared) > len(layers) / 2
                for path in compared:
                    np.testing.assert_allclose(got[path], inside[path], atol=1e-4, rtol=1e-4, err_msg=path)
            assert fixes["densenet"] in {layer.path: layer for layer in layers}["features.conv0"].reason
            with pytest.raises(InvalidArgument, match=f"not trusted.*--trust {DENSENET}"):
                client.features("densenet", _images(1), ["features.conv0"])
