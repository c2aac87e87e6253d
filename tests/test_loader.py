"""Loading one version: what is checked, and what is said of a program that can't be loaded."""

import hashlib
import shutil
from collections import Counter

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from layercast.models.manifest import MANIFEST_FILE, file_entry
from layercast.server import compiled
from layercast.server.loader import LoadError, load
from layercast.server.settings import ModelSettings


def rewrite(directory, name: str, content: bytes) -> None:
    """Put `content` in the place of a file and let the manifest agree."""
    (directory / name).write_bytes(content)
    entry = file_entry(directory / name).model_dump()
    tiny.edit_manifest(directory, lambda manifest: manifest["files"].update({name: entry}))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("exported"), 1, seed=1, programs=("torchscript", "onnx", "exported"))


@pytest.fixture
def artefact(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "1")


@pytest.mark.parametrize(
    ("engine", "program"), [("onnx", "model.onnx"), ("torchscript", "model.ts"), ("exported", "model.pt2")]
)
def test_a_program_that_its_runtime_refuses_is_named(artefact, engine, program):
    rewrite(artefact, program, b"no program at all")
    with pytest.raises(LoadError, match=rf"^{program} can't be loaded: \w+: .+") as raised:
        load(artefact, ModelSettings(engine=engine), 1)
    assert str(artefact) not in str(raised.value)
    assert "/" not in str(raised.value)
    if engine != "exported":  # which auto does not try
        loaded = load(artefact, ModelSettings(engine="auto"), 1)
        assert loaded.runner.fast.name != engine


def test_outputs_of_another_dtype_than_recorded_are_refused(artefact):
    golden = artefact / "golden.safetensors"
    tensors = load_file(golden)
    save_file({**tensors, "output.output": tensors["output.output"].double()}, golden)
    rewrite(artefact, "golden.safetensors", golden.read_bytes())
    with pytest.raises(LoadError, match="engine eager, output 'output': want dtype float64 as recorded .* got float32"):
        load(artefact, ModelSettings(engine="eager"), 1)


def test_an_engine_that_fails_on_the_golden_inputs_is_named(artefact):
    golden = artefact / "golden.safetensors"
    tensors = load_file(golden)
    save_file({**tensors, "input.x": torch.zeros(4, 9)}, golden)
    rewrite(artefact, "golden.safetensors", golden.read_bytes())
    with pytest.raises(LoadError, match="engine eager failed on the golden inputs: RuntimeError: "):
        load(artefact, ModelSettings(engine="eager"), 1)


@pytest.mark.parametrize("engine", ["auto", "eager", "onnx"])
def test_every_file_is_verified_and_none_is_hashed_twice(artefact, engine, monkeypatch):
    hashed: Counter[int] = Counter()
    real = hashlib.sha256

    def counting(content: bytes):
        hashed[len(content)] += 1
        return real(content)

    monkeypatch.setattr(hashlib, "sha256", counting)
    monkeypatch.setattr(compiled, "_looked_in", [])  # an engine on a kernel of our own reads the program again
    load(artefact, ModelSettings(engine=engine), 1)
    sizes = Counter(path.stat().st_size for path in artefact.iterdir() if path.name != MANIFEST_FILE)
    assert hashed == sizes


@pytest.mark.parametrize("name", ["weights.safetensors", "golden.safetensors", "model.ts", "model.onnx", "model.pt2"])
def test_a_flipped_bit_in_any_file_is_refused_also_in_one_that_is_not_used(artefact, name):
    content = bytearray((artefact / name).read_bytes())
    content[-1] ^= 1
    (artefact / name).write_bytes(content)
    with pytest.raises(LoadError, match=rf"^{name}: sha256"):
        load(artefact, ModelSettings(engine="eager"), 1)


def test_what_is_loaded_answers_as_the_module(artefact):
    for engine in ("eager", "torchscript", "onnx", "exported"):
        loaded = load(artefact, ModelSettings(engine=engine), 1)
        got = loaded.runner.fast.run({"x": tiny.ROWS})["output"]
        assert np.allclose(got, tiny.expected(1), atol=1e-5)
