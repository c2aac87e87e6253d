"""What the instances of one model share, and what is each one's own: modules may keep things in a forward."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from layercast.models.export.writer import export_artefact
from layercast.models.foreign.factory import Code, build
from layercast.models.foreign.trust import ARTEFACT_CODE, Trust
from layercast.server.loader import load
from layercast.server.model import Loaded
from layercast.server.settings import ModelSettings

CODE = """
import torch
from torch import nn


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(x)


class Scratch(Plain):
    \"\"\"Keeps its rows in a buffer while it computes.\"\"\"

    def __init__(self):
        super().__init__()
        self.register_buffer("rows", torch.zeros(64, 4))

    def forward(self, x):
        rows = self.rows[: x.shape[0]]
        rows.copy_(x)
        return self.head(rows)


class Keeping(Plain):
    \"\"\"Keeps what a function of its own is given; in a copy of it, that is the original's.\"\"\"

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.keep = lambda output: setattr(self, "kept", output)

    def forward(self, x):
        self.keep(self.body(x))
        return self.head(self.kept)
"""
TRUST = Trust.of([ARTEFACT_CODE])


def loaded(folder: Path, name: str, programs: list[Any], **settings: Any) -> tuple[Loaded, torch.nn.Module]:
    path = folder / "kinds.py"
    path.write_text(CODE)
    code = Code(path.name, path.read_bytes(), path)
    torch.manual_seed(0)
    module = build(f"kinds.py:{name}", {}, TRUST, code).eval()
    card = {
        "name": "kind",
        "architecture": f"kinds.py:{name}",
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}],
        "outputs": [{"name": "output", "datatype": "FP32", "shape": [-1, 2]}],
    }
    export_artefact(module, card, folder / "kind" / "1", programs=programs, code=code)
    return load(folder / "kind" / "1", ModelSettings(instances=2, max_batch=8, **settings), 2, TRUST), module


def pointers(tensors: Any) -> set[int]:
    return {tensor.data_ptr() for tensor in tensors}


@pytest.mark.parametrize("name", ["Plain", "Scratch", "Keeping"])
def test_modules_share_parameters_and_nothing_that_a_forward_writes_to(tmp_path, name):
    served, module = loaded(tmp_path, name, [], engine="eager")
    one, two = (runner.eager._module for runner in served.runners)
    assert pointers(one.parameters()) == pointers(two.parameters())
    assert not pointers(one.buffers()) & pointers(two.buffers())
    assert served.memory_bytes == served.runner.eager.memory_bytes
    rng = np.random.default_rng(0)
    for rows in (1, 5):
        for runner in (*served.runners, *served.runners):
            x = rng.random((rows, 4), "f4")
            with torch.no_grad():
                wanted = module(torch.from_numpy(x)).numpy()
            np.testing.assert_allclose(runner.fast.run({"x": x})["output"], wanted, atol=1e-6)


@pytest.mark.parametrize(("name", "shared"), [("Plain", True), ("Scratch", False)])
def test_a_program_that_writes_to_its_buffers_is_loaded_for_each_instance(tmp_path, name, shared):
    served, module = loaded(tmp_path, name, ["torchscript"], engine="torchscript")
    one, two = (runner.fast for runner in served.runners)
    assert (one is two) is shared
    x = np.random.default_rng(1).random((3, 4), "f4")
    with torch.no_grad():
        wanted = module(torch.from_numpy(x)).numpy()
    for engine in (one, two):
        np.testing.assert_allclose(engine.run({"x": x})["output"], wanted, atol=1e-6)


def test_what_is_explained_is_apart_from_what_batches_write_to(tmp_path):
    served, _ = loaded(tmp_path, "Scratch", [], engine="eager")
    eager = served.runner.eager
    assert pointers(eager._module.parameters()) == pointers(eager._explained.parameters())
    assert not pointers(eager._module.buffers()) & pointers(eager._explained.buffers())
