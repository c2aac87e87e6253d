"""State dicts as other people save them: all of the file goes into all of the module, or nothing does."""

import argparse
import ast
import io
import json
import os
import re
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from layercast.models import torch_files
from layercast.models.export.archive import refuse_pickles
from layercast.models.foreign.weights import WeightsError, load_file
from layercast.models.state_dicts import StateError
from layercast.models.torch_files import TorchFileError

ROOT = Path(__file__).parent.parent


class Net(nn.Module):
    """A tied pair, a batch norm with its statistics, and a table that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("table", torch.arange(4.0), persistent=False)

    def forward(self, tokens):
        return self.head(self.norm(self.embedding(tokens).mean(1)) + self.table)


def trained() -> dict[str, torch.Tensor]:
    torch.manual_seed(9)
    net = Net()
    net.norm.running_mean.uniform_(-1, 1)
    return net.state_dict()


def assert_loaded(net: nn.Module, state: dict[str, torch.Tensor]) -> None:
    for name, value in net.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert net.head.weight.data_ptr() == net.embedding.weight.data_ptr(), "the tie is kept"


def load(content: object, tmp_path: Path, name: str = "weights.pt", key: str = "") -> tuple[Net, list[str]]:
    path = tmp_path / name
    torch.save(content, path)
    net = Net()
    return net, load_file(net, path, key)


def prefixed(prefix: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {prefix + name: value for name, value in state.items()}


INSIDE = {name.replace("embedding.", "embedding._orig_mod."): value for name, value in trained().items()}
WRAPPINGS = {
    "plain": trained(),
    "DataParallel": prefixed("module.", trained()),
    "compiled": prefixed("_orig_mod.", trained()),
    "both": prefixed("module._orig_mod.", trained()),
    "the other way round": prefixed("_orig_mod.module.", trained()),
    "a compiled part": INSIDE,
    "Lightning": {"state_dict": prefixed("model.", trained()), "epoch": 1, "hyper_parameters": {"lr": 0.1}},
    "nested": {"model": trained(), "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}}, "epoch": 3},
    "nested twice": {"state_dict": {"net": prefixed("module.", trained())}},
    "averaged": {"n_averaged": torch.tensor(5), **prefixed("module.", trained())},
    "one tied name": {name: value for name, value in trained().items() if name != "head.weight"},
    "the other tied name": {name: value for name, value in trained().items() if name != "embedding.weight"},
    "a table from before it was left out": trained() | {"table": torch.arange(4.0)},
    "half precision": {name: v.half() if v.is_floating_point() else v for name, v in trained().items()},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_every_usual_wrapping_is_taken_off_and_every_tensor_arrives(tmp_path, wrapping):
    net, _ = load(WRAPPINGS[wrapping], tmp_path)
    halved = wrapping == "half precision"
    assert_loaded(net, {k: v.half().float() if halved and v.is_floating_point() else v for k, v in trained().items()})


def test_what_was_done_is_said(tmp_path):
    _, lines = load({"state_dict": prefixed("module.", trained())}, tmp_path)
    assert lines == ["weights from 'state_dict' in weights.pt", "took 'module.' off the names in the file"]
    assert load(trained(), tmp_path)[1] == []


def test_a_module_that_has_such_a_name_itself_keeps_it(tmp_path):
    holder = nn.ModuleDict({"module": Net()})
    torch.save(prefixed("module.", trained()), tmp_path / "a.pt")
    assert load_file(holder, tmp_path / "a.pt") == []
    assert_loaded(holder["module"], trained())
    torch.save(prefixed("module.module.", trained()), tmp_path / "b.pt")
    assert load_file(holder, tmp_path / "b.pt") == ["took 'module.' off the names in the file"]


def test_of_several_state_dicts_one_must_be_chosen(tmp_path):
    other = {name: value + 1 for name, value in trained().items()}
    content = {"model": trained(), "ema": other}
    with pytest.raises(WeightsError, match=r"several state dicts: 'model' \(7 tensors\), 'ema' .*--weights-key"):
        load(content, tmp_path)
    assert_loaded(load(content, tmp_path, key="ema")[0], other)
    with pytest.raises(WeightsError, match="no state dict under 'emma'; there is 'model'"):
        load(content, tmp_path, key="emma")
    net, lines = load({"teacher": {"other": torch.ones(1)}, "student": trained()}, tmp_path)  # only one can be meant
    assert_loaded(net, trained())
    assert lines == ["weights from 'student' in weights.pt"]


def without(name: str) -> dict[str, torch.Tensor]:
    return {key: value for key, value in trained().items() if key != name}


FAULTS = {
    "missing": (without("norm.bias"), "missing norm.bias; not expected nothing"),
    "missing both tied": (
        {k: v for k, v in without("head.weight").items() if k != "embedding.weight"},
        "missing embedding.weight",
    ),
    "unexpected": (trained() | {"extra": torch.ones(1)}, "missing nothing; not expected extra"),
    "renamed": (
        without("norm.running_mean") | {"norm.running_mean_": torch.ones(4)},
        "norm.running_mean may be norm.running_mean_",
    ),
    "wrong shape": (trained() | {"norm.bias": torch.ones(5)}, r"norm.bias: Net wants shape \[4\], the file has \[5\]"),
    "tied, yet different": (trained() | {"head.weight": torch.zeros(6, 4)}, "are one tensor in the module, but differ"),
    "another table": (trained() | {"table": torch.zeros(4)}, "not expected table"),
    "whole numbers": (trained() | {"norm.bias": torch.ones(4, dtype=torch.int64)}, "norm.bias: want torch.float32"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_weights_that_do_not_fit_are_refused_and_none_is_loaded(tmp_path, fault, suffix):
    content, message = FAULTS[fault]
    path = tmp_path / f"w.{suffix}"
    if suffix == "pt":
        torch.save(content, path)
    else:
        safetensors.torch.save_file({name: value.clone() for name, value in content.items()}, path)
    net = Net()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(StateError, match=message):
        load_file(net, path)
    assert_loaded(net, before)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"epoch": 3}, "holds no state dict"),
        ([torch.ones(1)], "holds no state dict"),
        (trained() | {"epoch": 3}, "holds no state dict"),
        ({"optimizer": {"state": trained()}}, "holds no state dict"),
    ],
)
def test_a_file_without_a_state_dict_is_refused(tmp_path, content, message):
    with pytest.raises(WeightsError, match=message):
        load(content, tmp_path)


def test_shards_are_joined_when_the_index_is_right(tmp_path):
    state = {name: value.clone() for name, value in without("head.weight").items()}
    first = dict(list(state.items())[:3])
    rest = {name: value for name, value in state.items() if name not in first}
    safetensors.torch.save_file(first, tmp_path / "one.safetensors")
    torch.save(rest, tmp_path / "two.bin")
    places = dict.fromkeys(first, "one.safetensors") | dict.fromkeys(rest, "two.bin")
    index = tmp_path / "model.index.json"

    def use(weight_map: dict[str, str]) -> Net:
        index.write_text(json.dumps({"weight_map": weight_map}))
        net = Net()
        load_file(net, index)
        return net

    assert_loaded(use(places), trained())
    with pytest.raises(WeightsError, match="two.bin: holds other tensors than model.index.json says"):
        use({name: place for name, place in places.items() if name != "norm.running_var"})
    with pytest.raises(WeightsError, match="not an index of weights: weight_map must hold names"):
        use({name: f"../{tmp_path.name}/{place}" for name, place in places.items()})
    index.write_text("{}")
    with pytest.raises(WeightsError, match="not an index of weights"):
        load_file(Net(), index)


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("name", ["w.pt", "w.pth", "w.bin", "w.ckpt", "w.pkl", "w.safetensors"])
@pytest.mark.parametrize("forced", [False, True])
def test_a_pickle_bomb_never_goes_off(tmp_path, monkeypatch, name, forced):
    if forced:  # torch's own way to unpickle everything must not reach us
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    marker = tmp_path / "marker"
    torch.save({"state_dict": trained(), "callback": Bomb(marker)}, tmp_path / name)
    with pytest.raises((WeightsError, TorchFileError)) as caught:
        load_file(Net(), tmp_path / name)
    assert not marker.exists()
    assert name in str(caught.value)
    if name in ("w.pt", "w.bin"):
        assert re.search(r"needs posix.mkdir to be read.*torch\.save\(model\.state_dict\(\), FILE\)", str(caught.value))
    with (tmp_path / name).open("rb") as file:
        torch.load(file, weights_only=False)
    assert marker.exists(), "the bomb is a real one"


def test_what_needs_more_than_tensors_names_it(tmp_path):
    with pytest.raises(TorchFileError, match="needs argparse.Namespace to be read"):
        load({"state_dict": trained(), "args": argparse.Namespace(lr=1)}, tmp_path)
    with pytest.raises(TorchFileError, match=r"needs \S*\.Net to be read"):
        load(Net(), tmp_path)


def test_a_damaged_file_is_one_line(tmp_path):
    path = tmp_path / "w.pt"
    torch.save(OrderedDict(trained()), path)
    whole = path.read_bytes()
    for content in (b"", b"text", whole[:100], whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(TorchFileError) as caught:
            load_file(Net(), path)
        assert "\n" not in str(caught.value)


def test_a_program_archive_with_a_pickle_is_refused_before_torch_reads_it(repository, tmp_path):
    content = (repository / "shared" / "1" / "model.pt2").read_bytes()
    refuse_pickles(content)
    marker = tmp_path / "marker"
    bomb = io.BytesIO()
    torch.save(Bomb(marker), bomb)

    def changed(replace: dict[str, bytes]) -> bytes:
        made = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(made, "w") as new:
            for name in old.namelist():
                new.writestr(name, replace.pop(name, None) or old.read(name))
            for name, extra in replace.items():
                new.writestr(name, extra)
        return made.getvalue()

    config = "model/data/weights/model_weights_config.json"
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        pickled = archive.read(config).replace(b'"use_pickle": false', b'"use_pickle": true', 1)
        assert b'"use_pickle": true' in pickled
    for fault in (
        {"model/data/sample_inputs/model.pt": bomb.getvalue()},
        {config: pickled},
        {"model/data/constants/model.pt": bomb.getvalue()},
        {"model/data/constants/custom_obj_0": bomb.getvalue()},
    ):
        with pytest.raises(TorchFileError):
            refuse_pickles(changed(fault))
    with pytest.raises(TorchFileError, match="not a torch.export archive"):
        refuse_pickles(bomb.getvalue()[:100])
    assert not marker.exists()


def test_only_one_module_unpickles():
    """By the source: what reads pickles stands in one module, and there for tensors alone."""
    reading = re.compile(r"(?<!safetensors\.)torch\.load\b|weights_only|\b(?:c?[Pp]ickle|dill|joblib|marshal|shelve)\b")
    found = set()
    for path in (p for folder in ("proto", "models", "server", "client") for p in (ROOT / folder).rglob("*.py")):
        code = ast.parse(path.read_text())
        for node in ast.walk(code):  # what texts say is not what is done
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                node.value = ""
        if reading.search(ast.unparse(code)) or "allow_pickle=True" in path.read_text():
            found.add(path.relative_to(ROOT).as_posix())
    assert found == {"models/torch_files.py"}
    source = ast.unparse(ast.parse(Path(torch_files.__file__).read_text()))
    assert len(re.findall(r"torch\.load\(", source)) == len(re.findall(r"weights_only=True", source)) == 1
