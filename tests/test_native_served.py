"""Engines on our own kernels in a server process, which is told where those are: their answers, and their errors."""

import json
import re
import shutil
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from native_cases import ENGINES, Case, case_of
from test_server_inference import offline, values_of
from test_server_process import READY, infer, serving

from layercast.proto.messages import ModelInferRequest

PORTS = ("--grpc-port", "0", "--http-port", "0", "--metrics-port", "0")
OTHERS = {"winograd": "mnist", "encoder": "shared"}
"""Models that the engines can't run."""
LAYERS = {"winograd": "layer:layer2@mean", "encoder": "layer:blocks.1@mean"}
FRONT_ENDS = [
    "direct",
    "grpcio",
    pytest.param(
        "envoy", marks=pytest.mark.skipif(find_spec("pyvoy") is None, reason="the front end envoy needs pyvoy")
    ),
]


@pytest.fixture(params=ENGINES)
def case(request, repository, modules) -> Case:
    return case_of(request.param, repository, modules)


def asking(root: Path, *models: tuple[Path, str]) -> Path:
    """Return a repository of versions, each of which asks for an engine."""
    for directory, engine in models:
        model = root / directory.parent.name
        shutil.copytree(directory.parent, model)
        (model / "layercast.toml").write_text(f'engine = "{engine}"\n')
    return root


@pytest.fixture(scope="module", params=FRONT_ENDS)
def server(request, repository, modules, tmp_path_factory, kernels_folder) -> Iterator[Any]:
    """A process with the models of both engines, and one for each that it can't run."""
    cases = [(case.directory, case.engine) for case in (case_of(engine, repository, modules) for engine in ENGINES)]
    root = tmp_path_factory.mktemp("served")
    models = asking(root / "models", *cases, *((repository / name / "1", engine) for engine, name in OTHERS.items()))
    options = ("--cache", str(root / "cache"), "--compiled", str(kernels_folder), "--front-end", request.param)
    with serving(models, *PORTS, *options, seconds=280) as server:
        server.ready = server.read_until(READY)
        yield server


def message(case: Case, values: np.ndarray, outputs: tuple[str, ...] = ()) -> ModelInferRequest:
    made = ModelInferRequest(model_name=case.name)
    spec = case.manifest.inputs[0]
    made.inputs.add(name=spec.name, datatype=spec.datatype, shape=values.shape)
    made.raw_input_contents.append(np.ascontiguousarray(values).tobytes())
    for name in outputs:
        made.outputs.add(name=name)
    return made


def read(http: str, path: str, body: Any = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{http}{path}", data), timeout=30) as answer:
        return json.load(answer)


def test_it_answers_as_the_module_does_and_is_shown(case, server):
    grpc_port, http_port, _ = server.ready.groups()
    text = "\n".join(server.lines)
    assert re.search(rf"{case.name} +1 +{case.engine} +cpu", text)
    assert "; compiled" not in text
    for rows, length in ((1, 20), (3, 1), (17, 40), (2, 7)):
        x = case.inputs(rows, length)
        wanted = offline(case.module, x)
        got = values_of(infer(grpc_port, message(case, x)))
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-4 * max(1.0, np.abs(wanted).max()))
    metadata = read(http_port, f"/v2/models/{case.name}")
    assert metadata["properties"]["engine"] == case.engine
    assert f"{case.engine} (" in metadata["properties"]["engines"]
    output, layer = case.manifest.outputs[0].name, LAYERS[case.engine]
    tapped = infer(grpc_port, message(case, x, (output, layer)))
    np.testing.assert_allclose(values_of(tapped), wanted, rtol=1e-3, atol=1e-3)


def test_texts_of_mixed_lengths_that_are_batched_have_the_answers_they_have_alone(case, server):
    """Many at once, each of its own rows and length."""
    batches = [case.inputs(1 + at % 3, 1 + at * 7 % 40) for at in range(48)]
    with ThreadPoolExecutor(12) as pool:
        answers = pool.map(lambda x: values_of(infer(server.ready[1], message(case, x))), batches)
        for x, got in zip(batches, answers, strict=True):
            wanted = offline(case.module, x)
            np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-4 * max(1.0, np.abs(wanted).max()))


def test_a_model_that_it_can_not_run_says_so_in_the_index(case, server):
    index = {entry["name"]: entry for entry in read(server.ready[2], "/v2/repository/index", {})}
    other = index[OTHERS[case.engine]]
    assert index[case.name]["state"] == "READY"
    assert other["state"] == "UNAVAILABLE"
    assert f"engine {case.engine} " in other["reason"]
    assert case.misses in other["reason"]


def test_without_the_kernel_it_says_what_makes_it(case, tmp_path):
    models = asking(tmp_path / "models", (case.directory, case.engine))
    options = (*PORTS, "--cache", str(tmp_path / "cache"), "--compiled", str(tmp_path / "absent"))
    with serving(models, *options) as server:
        reason = rf"engine {case.engine} is asked for, but its kernel is not compiled \(`layercast compile`"
        server.read_until(rf"no model could be loaded: {case.name} 1: {reason}")
