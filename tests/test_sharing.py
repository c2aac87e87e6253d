"""Shared weights stay shared: on disk, in a copy, in every exported program."""

import copy
from pathlib import Path

import onnx
import pytest
import safetensors.numpy
import torch
from torch import nn

from layercast.models.artefact import load_weights, save_weights
from layercast.models.export import torchscript
from layercast.models.manifest import Manifest

pytestmark = pytest.mark.usefixtures("one_thread")


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7)
        self.head.weight = self.embed.weight

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.embed(words))
        return logits


def test_a_tied_weight_is_stored_once_and_tied_again_by_loading(tmp_path: Path):
    model, words = Tied(), torch.tensor([[0, 3, 6]])
    save_weights(model, tmp_path / "weights.safetensors")
    content = (tmp_path / "weights.safetensors").read_bytes()
    assert sum(array.size for array in safetensors.numpy.load(content).values()) == 28 + 7
    loaded, copied = Tied(), copy.deepcopy(model)
    load_weights(loaded, content, "weights")
    for other in (loaded, copied):
        assert other.head.weight is other.embed.weight
        assert other.head.weight.data_ptr() != model.head.weight.data_ptr()
        assert torch.equal(other(words), model(words))
        with torch.no_grad():
            other.embed.weight.zero_()
        assert not other.head.weight.any()


def test_every_program_of_shared_weights_holds_them_once(repository: Path):
    folder = repository / "shared" / "1"
    stored = safetensors.numpy.load((folder / "weights.safetensors").read_bytes())
    assert sum(array.size for array in stored.values()) == 110
    graph = onnx.load(folder / "model.onnx").graph
    sizes = [onnx.numpy_helper.to_array(tensor).size for tensor in graph.initializer]
    assert [size for size in sizes if size >= 10] in ([100, 10], [10, 100])
    program = torch.export.load(folder / "model.pt2")
    assert sum(tensor.numel() for tensor in program.state_dict.values()) == 110
    assert Manifest.read(folder).layers_by_path["shared#1"].parameters == 110
    with torchscript._quiet():
        script = torch.jit.load(folder / "model.ts")
    assert sum(parameter.numel() for parameter in script.parameters()) == 110
