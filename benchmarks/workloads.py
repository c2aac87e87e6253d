"""What is measured: models, requests and how many of them are in flight; and the artefacts that answer them."""

import shutil
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import nn

from layercast.models import zoo
from layercast.models.export.writer import export_artefact
from layercast.models.foreign.factory import Code, build
from layercast.models.foreign.trust import ARTEFACT_CODE, Trust
from layercast.proto.messages import ModelInferRequest

ENCODER: Final = """
from torch import nn

from layercast.models.layers.attention import TransformerEncoderBlock


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(*(TransformerEncoderBlock(128, 4, 512) for _ in range(4)))

    def forward(self, x):
        return self.blocks(x)
"""
"""The four-layer encoder on 28 x 128 that peers were measured with; untrained, which costs the same."""


@dataclass(frozen=True)
class Workload:
    """One kind of request, `concurrency` of them in flight at a time. `output` is asked for alone, if any is."""

    model: str
    shape: tuple[int, ...]
    concurrency: int
    output: str = ""

    @property
    def name(self) -> str:
        """What the table calls it."""
        rows = "single rows" if self.shape[0] == 1 else f"{self.shape[0]} rows"
        output = f", {self.output}" if self.output else ""
        return f"{self.model}{output}, {rows}, c={self.concurrency}"


_DIGIT, _PICTURE, _TOKENS, _SEQUENCE = (1, 28, 28), (3, 32, 32), (48,), (28, 128)
WORKLOADS: Final = (
    Workload("mnist", (1, *_DIGIT), 1),
    Workload("mnist", (1, *_DIGIT), 16),
    Workload("mnist", (1, *_DIGIT), 64),
    Workload("mnist", (32, *_DIGIT), 4),
    Workload("resnet", (1, *_PICTURE), 16),
    Workload("transformer", (1, *_TOKENS), 16),
    Workload("transformer", (1, *_TOKENS), 64),
    Workload("encoder", (1, *_SEQUENCE), 16),
    Workload("encoder", (1, *_SEQUENCE), 64),
    Workload("resnet", (1, *_PICTURE), 16, output="layer:layer2@mean"),
)


def write_repository(root: Path, cache: Path | None) -> None:
    """Put the zoo and the encoder into `root`, as a repository of the server."""
    root.mkdir(parents=True, exist_ok=True)
    exported = zoo.ensure_exported(cache, report=print)
    for model in exported.iterdir():
        if model.is_dir():
            shutil.copytree(model, root / model.name)
    path = root.parent / "encoder.py"
    path.write_text(ENCODER)
    code = Code("encoder.py", path.read_bytes(), path)
    torch.manual_seed(0)
    module: nn.Module = build("encoder.py:Encoder", {}, Trust.of([ARTEFACT_CODE]), code).eval()
    spec = {"datatype": "FP32", "shape": [-1, *_SEQUENCE]}
    card = {
        "name": "encoder", "architecture": "encoder.py:Encoder",
        "inputs": [{"name": "x", **spec}], "outputs": [{"name": "output", **spec}],
    }  # fmt: skip
    export_artefact(module, card, root / "encoder" / "1", code=code)


def rows(datatype: str, shape: Sequence[int]) -> np.ndarray:
    """Return values that any of the models takes."""
    rng = np.random.default_rng(0)
    return rng.random(shape, dtype="f4") if datatype == "FP32" else rng.integers(1, 100, shape).astype("i8")


def request(workload: Workload, name: str, datatype: str) -> ModelInferRequest:
    """Return the request of `workload` for the model's input `name`."""
    message = ModelInferRequest(model_name=workload.model, id="1")
    message.inputs.add(name=name, datatype=datatype, shape=workload.shape)
    message.raw_input_contents.append(rows(datatype, workload.shape).tobytes())
    if workload.output:
        message.outputs.add(name=workload.output)
    return message


def framed(message: bytes) -> bytes:
    """Return `message` as the body of a gRPC call (https://grpc.io: gRPC over HTTP2, Length-Prefixed-Message)."""
    return struct.pack(">BI", 0, len(message)) + message
