"""Modules that are exported together: torch's export takes one to two seconds, however small the module."""

import importlib
import re
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from layercast.models.export.writer import export_artefact


class Beside(nn.Module):
    """Modules of one class that get the same inputs and give an output each, of their names."""

    def __init__(self, of: str, parts: dict[str, dict[str, Any]]) -> None:
        super().__init__()
        module, _, name = of.partition(":")
        make = getattr(importlib.import_module(module), name)
        self.parts = nn.ModuleList(make(**arguments) for arguments in parts.values())
        self.named = dict(zip(parts, self.parts, strict=True))

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        return {output_of(name): part(**inputs) for name, part in self.named.items()}


def output_of(name: str) -> str:
    """Return what the output of the module of that name is called."""
    return re.sub(r"\W", "_", name)


def export(
    root: Path, of: str, parts: dict[str, dict[str, Any]], inputs: list[dict], output: dict
) -> tuple[Beside, Path]:
    """Return the modules, as one, and their artefact; `output` is the spec of each output."""
    torch.manual_seed(3)
    arguments = {"of": of, "parts": parts}
    card = {
        "name": "m", "architecture": "beside:Beside", "arguments": arguments, "inputs": inputs,
        "outputs": [{"name": output_of(name), **output} for name in parts],
    }  # fmt: skip
    module = Beside(**arguments).eval()
    export_artefact(module, card, root / "m" / "1", programs=("onnx",))
    return module, root / "m" / "1"


def nodes_of(directory: Path, name: str) -> list[onnx.NodeProto]:
    """Return the nodes of the ONNX program that the output of the module of that name comes from."""
    makers = {value: node for node in onnx.load(directory / "model.onnx").graph.node for value in node.output}
    assert output_of(name) in makers
    found, sought = {}, [output_of(name)]
    while sought:
        node = makers.get(sought.pop())
        if node is not None and node.output[0] not in found:
            found[node.output[0]] = node
            sought += node.input
    return list(found.values())


def operators_of(directory: Path, name: str) -> list[str]:
    """Return the operators of those nodes."""
    return [node.op_type for node in nodes_of(directory, name)]
