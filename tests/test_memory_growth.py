"""Memory under load: what the server keeps after its pools are full, and a control that leaks and must be seen."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from oracle.soak import gauges
from test_server_inference import request, rows_for
from test_server_process import FREE, READY, serving

from layercast.models.export.writer import export_artefact
from layercast.models.foreign.factory import Code, build
from layercast.models.foreign.trust import ARTEFACT_CODE, Trust
from layercast.proto.messages import ModelInferRequest
from layercast.proto.rpc import INFERENCE

ALLOWED_MB = 20.0
CALLERS, WARM_UP, MEASURED = 8, 150, 300

LEAKY = """
import torch
from torch import nn


class Leaky(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 2)
        self.kept = []

    def forward(self, x):
        if not torch.compiler.is_exporting():
            self.kept.append(bytearray(50_000))
        return self.head(x)
"""
AT_ONCE = (*FREE, "--max-delay-ms", "0")


class Load:
    """Requests from several callers at once, over one channel, and how much the server's memory grew meanwhile."""

    def __init__(self, grpc_port: str, metrics_port: str) -> None:
        self._channel = grpc.insecure_channel(f"127.0.0.1:{grpc_port}")
        method = INFERENCE["ModelInfer"]
        self.infer = self._channel.unary_unary(
            method.path, method.request.SerializeToString, method.response.FromString
        )
        self._metrics = f"http://127.0.0.1:{metrics_port}/metrics"

    def growth_mb(self, ask: Callable[[Any, int], None]) -> float:
        """Return by how much resident memory grew in the measured requests, after as many to warm up."""
        with ThreadPoolExecutor(CALLERS) as pool:
            list(pool.map(lambda number: ask(self.infer, number), range(CALLERS * WARM_UP)))
            before = self._resident()
            list(pool.map(lambda number: ask(self.infer, number), range(CALLERS * MEASURED)))
        return (self._resident() - before) / 1e6

    def _resident(self) -> float:
        return gauges(self._metrics, "process_resident_memory_bytes")["process_resident_memory_bytes"]


def plain(infer: Any, number: int) -> None:
    infer(request("mnist", rows_for("mnist", 1 + number % 8)), timeout=30)


def random_lengths(infer: Any, number: int) -> None:
    infer(request("transformer", rows_for("transformer", 1, length=1 + number % 32)), timeout=30)


def errors(infer: Any, number: int) -> None:
    with pytest.raises(grpc.RpcError):
        infer(request("mnist", rows_for("mnist", 1), [f"nothing-{number}"]), timeout=30)


def cancels(infer: Any, number: int) -> None:
    infer.future(request("mnist", rows_for("mnist", 2)), timeout=30).cancel()


def features(infer: Any, number: int) -> None:
    infer(request("mnist", rows_for("mnist", 2), ["logits", "layer:net.*@mean"]), timeout=30)


@pytest.fixture(scope="module")
def load(repository: Path) -> Any:
    with serving(repository, *AT_ONCE) as server:
        ports = server.read_until(READY)
        yield Load(ports[1], ports[3])


@pytest.mark.parametrize("ask", [plain, random_lengths, errors, cancels, features])
def test_memory_does_not_grow_with_requests(load, ask):
    assert load.growth_mb(ask) < ALLOWED_MB


def test_a_model_that_leaks_is_seen(tmp_path: Path):
    path = tmp_path / "leaky.py"
    path.write_text(LEAKY)
    code = Code("leaky.py", path.read_bytes(), path)
    module = build("leaky.py:Leaky", {}, Trust.of([ARTEFACT_CODE]), code).eval()
    card = {
        "name": "leaky",
        "architecture": "leaky.py:Leaky",
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}],
        "outputs": [{"name": "output", "datatype": "FP32", "shape": [-1, 2]}],
    }
    export_artefact(module, card, tmp_path / "models" / "leaky" / "1", programs=[], code=code)
    x = torch.zeros(1, 4).numpy().astype(np.float32)

    def ask(infer: Any, number: int) -> None:
        message = ModelInferRequest(model_name="leaky", raw_input_contents=[x.tobytes()])
        message.inputs.add(name="x", datatype="FP32", shape=x.shape)
        infer(message, timeout=30)

    with serving(tmp_path / "models", *AT_ONCE, "--max-batch", "1", "--trust", "artefact-code") as server:
        ports = server.read_until(READY)
        assert Load(ports[1], ports[3]).growth_mb(ask) > ALLOWED_MB
