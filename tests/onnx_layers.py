"""Layers read from the ONNX program and from the module, and artefacts whose manifests say something else."""

import shutil
from pathlib import Path

import numpy as np
import torch
from tiny import edit_manifest

from layercast.models.artefact import load_module
from layercast.models.examples import Examples
from layercast.models.manifest import Manifest
from layercast.server.engines.eager import EagerEngine
from layercast.server.engines.taps import OnnxProgram

CPU = torch.device("cpu")


def program(directory: Path) -> OnnxProgram:
    return OnnxProgram(directory, Manifest.read(directory), 1)


def hooks(directory: Path) -> EagerEngine:
    manifest = Manifest.read(directory)
    return EagerEngine(load_module(directory, manifest), manifest, CPU)


def inputs_of(manifest: Manifest, batch: int, length: int = 9) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in Examples(manifest.inputs, seed=5).make(batch, length).items()}


def close(got: dict, wanted: dict) -> None:
    assert got.keys() == wanted.keys()
    for key, value in got.items():
        assert value.dtype == wanted[key].dtype
        loose = 1e-3 if value.dtype == np.float16 else 1e-4
        np.testing.assert_allclose(value, wanted[key], atol=loose, rtol=loose, err_msg=str(key))


def note_parts(monkeypatch) -> list[frozenset[str]]:
    """Return the list to which every set of layers is added that a part is compiled for, in turn."""
    sets: list[frozenset[str]] = []
    part = OnnxProgram.part

    def noted(self: OnnxProgram, layers, predict: bool):
        sets.append(frozenset(layers))
        return part(self, layers, predict)

    monkeypatch.setattr(OnnxProgram, "part", noted)
    return sets


def untrusted(directory: Path, tmp_path: Path) -> Path:
    copied = shutil.copytree(directory, tmp_path / directory.parent.name / "1")
    edit_manifest(copied, lambda manifest: manifest.update(architecture="elsewhere:Net"))
    return copied
