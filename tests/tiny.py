"""A model that is exported and loaded in milliseconds, for tests that load it often."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from serving import Running
from torch import nn

from layercast.models import registry
from layercast.models.export.writer import export_artefact
from layercast.proto.messages import ModelInferRequest, RepositoryIndexRequest, RepositoryModelLoadRequest

ROWS = np.random.default_rng(1).random((3, 10), dtype="f4")


def module(seed: int) -> nn.Module:
    """Return one of many modules that give clearly different answers."""
    made = registry.build("SharedWeights").eval()
    own = torch.Generator().manual_seed(seed)  # threads of a test share torch's
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.uniform_(-0.5, 0.5, generator=own)
    return made


def card(name: str) -> dict[str, Any]:
    return {
        "name": name, "architecture": "SharedWeights", "arguments": {},
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 10]}],
        "outputs": [{"name": "output", "datatype": "FP32", "shape": [-1, 10]}],
    }  # fmt: skip


def write(root: Path, version: int, seed: int, name: str = "tiny", programs: tuple[Any, ...] = ()) -> Path:
    """Export into `root` as a version, replacing it when it is there, and return its directory."""
    directory = root / name / str(version)
    export_artefact(module(seed), card(name), directory, programs=programs, force=True)
    return directory


def expected(seed: int, rows: np.ndarray = ROWS) -> np.ndarray:
    with torch.inference_mode():
        return module(seed)(torch.from_numpy(rows.copy())).numpy()


def request(name: str = "tiny", version: str = "", rows: np.ndarray = ROWS) -> ModelInferRequest:
    message = ModelInferRequest(model_name=name, model_version=version)
    message.inputs.add(name="x", datatype="FP32", shape=rows.shape)
    message.raw_input_contents.append(rows.tobytes())
    return message


def values(answer: Any) -> np.ndarray:
    return np.frombuffer(answer.raw_output_contents[0], "<f4").reshape(answer.outputs[0].shape)


def answered(server: Running, name: str = "tiny", version: str = "") -> np.ndarray:
    return values(server.call("ModelInfer", request(name, version)))


def load(server: Running, name: str = "tiny") -> None:
    server.call("RepositoryModelLoad", RepositoryModelLoadRequest(model_name=name), timeout=60)


def index(server: Running) -> dict[tuple[str, str], tuple[str, str]]:
    """Return (state, reason) by (model, version)."""
    found = server.call("RepositoryIndex", RepositoryIndexRequest()).models
    return {(model.name, model.version): (model.state, model.reason) for model in found}


def edit_manifest(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = directory / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def half_copy(source: Path, target: Path) -> None:
    """Copy as a slow copy stands half way: the manifest is there, the weights are not whole."""
    shutil.copytree(source, target)
    weights = target / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
