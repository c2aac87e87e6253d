"""The engine winograd in a server of its own process, which is told where the kernel is: its answers, and its errors."""

import json
import shutil
import urllib.error
import urllib.request
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import compiled_kernels
import numpy as np
import pytest
from test_server_inference import offline, request, rows_for, values_of
from test_server_process import READY, infer, serving

PORTS = ("--grpc-port", "0", "--http-port", "0", "--metrics-port", "0")
FRONT_ENDS = [
    "direct",
    "grpcio",
    pytest.param(
        "envoy", marks=pytest.mark.skipif(find_spec("pyvoy") is None, reason="the front end envoy needs pyvoy")
    ),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Only kernels: the sources run."""
    output = tmp_path_factory.mktemp("kernels")
    compiled_kernels.make(output)
    return output


def asking(repository: Path, root: Path, *names: str) -> Path:
    """Return a repository of some models that ask for the engine."""
    for name in names:
        shutil.copytree(repository / name, root / name)
        (root / name / "layercast.toml").write_text('engine = "winograd"\n')
    return root


def read(http: str, path: str, body: Any = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{http}{path}", data), timeout=30) as answer:
        return json.load(answer)


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_it_answers_as_the_module_does_and_is_shown(repository, modules, tmp_path, folder, front_end):
    models = asking(repository, tmp_path / "models", "resnet")
    cache = ("--cache", str(tmp_path / "cache"))
    with serving(models, *PORTS, *cache, "--compiled", str(folder), "--front-end", front_end) as server:
        grpc_port, http_port, _ = server.read_until(READY).groups()
        text = "\n".join(server.lines)
        assert "resnet  1    winograd  cpu" in text
        assert "; compiled" not in text
        for rows in (1, 3, 17):
            x = rows_for("resnet", rows)
            wanted = offline(modules["resnet"], x)
            got = values_of(infer(grpc_port, request("resnet", x)))
            np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-4 * max(1.0, np.abs(wanted).max()))
        metadata = read(http_port, "/v2/models/resnet")
        assert metadata["properties"]["engine"] == "winograd"
        assert "winograd (1 thread)" in metadata["properties"]["engines"]
        tapped = infer(grpc_port, request("resnet", x, ["logits", "layer:layer2@mean"]))
        np.testing.assert_allclose(values_of(tapped), wanted, rtol=1e-3, atol=1e-3)


def test_a_model_that_it_can_not_run_says_so_in_the_index(repository, tmp_path, folder):
    models = asking(repository, tmp_path / "models", "mnist", "resnet")
    with serving(models, *PORTS, "--cache", str(tmp_path / "cache"), "--compiled", str(folder)) as server:
        _, http_port, _ = server.read_until(READY).groups()
        index = {entry["name"]: entry for entry in read(http_port, "/v2/repository/index", {})}
    assert index["resnet"]["state"] == "READY"
    assert index["mnist"]["state"] == "UNAVAILABLE"
    assert "engine winograd " in index["mnist"]["reason"]
    assert "convolution" in index["mnist"]["reason"]


def test_without_the_kernel_it_says_what_makes_it(repository, tmp_path):
    models = asking(repository, tmp_path / "models", "resnet")
    options = (*PORTS, "--cache", str(tmp_path / "cache"), "--compiled", str(tmp_path / "absent"))
    with serving(models, *options) as server:
        reason = r"engine winograd is asked for, but its kernel is not compiled \(`layercast compile`"
        server.read_until(rf"no model could be loaded: resnet 1: {reason}")
