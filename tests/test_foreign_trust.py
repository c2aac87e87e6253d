"""Code that an artefact names runs only where the operator said so, and only what makes a module."""

import hashlib
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from serving import running
from torch import nn

from layercast.models.artefact import build, load_module
from layercast.models.foreign.factory import Code, FactoryError, NameFault
from layercast.models.foreign.trust import ARTEFACT_CODE, Trust
from layercast.models.manifest import Manifest, ManifestError, file_entry
from layercast.server.errors import StartError
from layercast.server.loader import LoadError, load
from layercast.server.settings import ModelSettings, read

ROOM = """
import os
from os import system
from pathlib import Path
import functools

import torch
from torch import nn
from torch.nn import Linear

Path(__file__).with_name("ran").touch()

class Net(nn.Module):
    def __init__(self, size=3):
        super().__init__()
        self.linear = nn.Linear(size, 2)

    @classmethod
    def wide(cls):
        return cls(30)

    def forward(self, x):
        return self.linear(x)

class Plain:
    pass

ready = Net()
half = functools.partial(Net, 4)

def text():
    return "text"

def broken(depth=1):
    raise KeyError("depth")

def leaves():
    raise SystemExit(3)
"""


@pytest.fixture
def room(tmp_path, monkeypatch) -> Path:
    """An installed package `room` with a submodule; importing it leaves the file `ran` beside its source."""
    package = tmp_path / "room"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "nets.py").write_text(ROOM)
    (package / "faulty.py").write_text("import no_such_dependency")
    (package / "again.py").write_text("from room.nets import Net")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield package
    for name in [name for name in sys.modules if name.partition(".")[0] == "room"]:
        del sys.modules[name]


@pytest.mark.parametrize("entry", ["room", "room.nets", "room.nets:Net"])
def test_a_package_a_module_or_one_factory_can_be_trusted(room, entry):
    made = build("room.nets:Net", {"size": 5}, Trust.of([entry]))
    assert made.linear.in_features == 5
    assert build("room.nets:Net.wide", {}, Trust.of(["room"])).linear.in_features == 30


@pytest.mark.parametrize("entries", [[], ["roo"], ["room.nets.more"], ["room.nets:text"], [ARTEFACT_CODE], ["other"]])
def test_what_is_not_trusted_is_not_even_imported(room, entries):
    with pytest.raises(FactoryError, match=r"room\.nets:Net, is not trusted; .*--trust room\.nets:Net"):
        build("room.nets:Net", {}, Trust.of(entries))
    assert not (room / "ran").exists()
    assert "room" not in sys.modules


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ("room.nets:os.system", "is defined in posix, which is not trusted"),
        ("room.nets:system", "is defined in posix, which is not trusted"),
        ("room.nets:Linear", r"defined in torch\.nn\.modules\.linear.*name torch\.nn\.modules\.linear:Linear"),
        ("room.nets:text", "returned str; want an nn.Module"),
        ("room.nets:Plain", "is a class, but no nn.Module"),
        ("room.nets:ready", "is a module already"),
        ("room.nets:half", "is a partial; want a class or a function"),
        ("room.nets:Nett", "there is no 'Nett' in it; nearest: Net"),
        ("room.nets:Net.__init__", "there is no '__init__'"),
        ("room.nets:broken", "raised KeyError"),
        ("room.nets:leaves", "raised SystemExit: 3"),
        ("room.netz:Net", "there is no module 'room.netz' here; install"),
        ("room.faulty:Net", "importing room.faulty raised ModuleNotFoundError: No module named 'no_such_dependency'"),
    ],
)
def test_only_what_makes_a_module_is_called(room, architecture, message):
    with pytest.raises(FactoryError, match=message):
        build(architecture, {}, Trust.of(["room"]))


def test_wrong_arguments_name_what_there_is(room):
    with pytest.raises(NameFault, match=r"unexpected keyword argument 'width'; it takes \(size=3\)"):
        build("room.nets:Net", {"width": 1}, Trust.of(["room"]))


def test_one_factory_does_not_open_the_rest_of_its_module(room):
    trust = Trust.of(["room.again:Net"])
    assert isinstance(build("room.again:Net", {}, trust), nn.Module)
    with pytest.raises(FactoryError, match="not trusted"):
        build("room.nets:Net", {}, trust)


def test_a_file_stands_alone_and_is_run_once(tmp_path):
    path = tmp_path / "net.py"
    code = Code("net.py", ROOM.encode(), path)
    trust = Trust.of([ARTEFACT_CODE])
    first, second = (build("net.py:Net", {}, trust, code) for _ in range(2))
    assert type(first) is type(second)
    with pytest.raises(FactoryError, match="its code, a file in the artefact, is not trusted; .*--trust artefact-code"):
        build("net.py:Net", {}, Trust.of(["net", "net.py"]), code)
    sibling = Code("net.py", b"import helpers_beside_it", path)
    with pytest.raises(FactoryError, match="No module named 'helpers_beside_it'; the file must stand alone"):
        build("net.py:Net", {}, trust, sibling)
    with pytest.raises(FactoryError, match="SyntaxError"):
        build("net.py:Net", {}, trust, Code("net.py", b"class", path))


@pytest.fixture
def artefact(repository, tmp_path) -> Path:
    """A copy of a served artefact whose manifest names `os.mkdir`, with the marker that it would make."""
    root = tmp_path / "repository"
    shutil.copytree(repository / "shared", root / "shared")
    return root


def rewrite(root: Path, **changes: object) -> Path:
    path = root / "shared" / "1" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return path.parent


@pytest.mark.parametrize("engine", ["auto", "onnx", "torchscript", "exported"])
def test_a_manifest_that_names_a_function_of_the_system_calls_nothing(artefact, tmp_path, engine):
    marker = tmp_path / "marker"
    directory = rewrite(artefact, architecture="os:mkdir", arguments={"path": str(marker)})
    loaded = load(directory, ModelSettings(engine=engine), 1)
    assert loaded.runner.eager is None
    assert loaded.runner.fast.name in ("onnx", "torchscript", "exported")
    assert "--trust os:mkdir" in loaded.note
    assert all(layer.path in loaded.manifest.onnx_values for layer in loaded.manifest.layers if layer.available)
    with pytest.raises(LoadError, match="engine eager is asked for, but its code, os:mkdir, is not trusted"):
        load(directory, ModelSettings(engine="eager"), 1)
    with pytest.raises(FactoryError, match="not trusted"):
        load_module(directory, Manifest.read(directory))
    assert not marker.exists()
    with pytest.raises(LoadError, match="os:mkdir is defined in posix, which is not trusted"):
        load(directory, ModelSettings(), 1, Trust.of(["os"]))
    assert not marker.exists()


@pytest.mark.parametrize("program", ["torchscript", "exported"])
def test_a_program_that_could_run_code_is_not_taken_unasked(artefact, program):
    manifest = json.loads((artefact / "shared/1/manifest.json").read_text())
    directory = rewrite(artefact, architecture="room:Net", programs={program: manifest["programs"][program]})
    with pytest.raises(LoadError, match=f"--trust room:Net, or set engine to {program}"):
        load(directory, ModelSettings(), 1)
    assert load(directory, ModelSettings(engine=program), 1).runner.fast.name == program


def test_code_in_an_artefact_is_checked_like_every_file(artefact):
    source = artefact / "shared" / "1" / "net.py"
    source.write_text(
        "from layercast.models.architectures.simple import SharedWeights\nclass Net(SharedWeights): pass\n"
    )
    manifest = json.loads((artefact / "shared/1/manifest.json").read_text())
    files = manifest["files"] | {"net.py": file_entry(source).model_dump()}
    directory = rewrite(artefact, architecture="net.py:Net", code="net.py", files=files)
    trust = Trust.of([ARTEFACT_CODE])
    assert load(directory, ModelSettings(), 1, trust).runner.eager is not None
    source.write_text(source.read_text() + "# changed")
    with pytest.raises(LoadError, match="net.py: .* bytes in manifest.json"):
        load(directory, ModelSettings(), 1, trust)
    for changes in ({"code": "other.py"}, {"architecture": "net.py:Net", "code": "../net.py"}):
        with pytest.raises(ManifestError, match="want .*:NAME for the code|is not a plain|used but not listed"):
            Manifest.read(rewrite(artefact, **changes))
        rewrite(artefact, architecture="net.py:Net", code="net.py")
    assert hashlib.sha256(source.read_bytes()).hexdigest() != files["net.py"]["sha256"]


def test_a_server_says_in_its_index_why_layers_are_missing(artefact):
    rewrite(artefact, architecture="room.nets:Net")
    fault = "its code, room.nets:Net, is not trusted; start the server with --trust room.nets:Net"
    with running(artefact) as server:
        (version,) = server.server.repository.versions()
        assert (version.state, version.model is not None) == ("READY", True)
        assert version.reason == f"layers are read from the ONNX program, 3 of 3: {fault}"
    rewrite(artefact, onnx_values={})
    with running(artefact) as server:
        (version,) = server.server.repository.versions()
        assert version.reason == f"layers are not available: {fault}"


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("elsewhere")
def test_trust_is_a_setting_like_any_other(monkeypatch):
    assert read({}).trust == ()
    Path("layercast.toml").write_text('trust = ["timm"]\n')
    assert read({}).trust == ("timm",)
    monkeypatch.setenv("LAYERCAST_TRUST", "timm:create_model, artefact-code")
    assert read({}).trust == ("timm:create_model", "artefact-code")
    assert read({"trust": ["monai", "transformers"]}).trust == ("monai", "transformers")
    for wrong in ("../timm", "artefact code", "timm:", "a:b:c"):
        with pytest.raises(StartError, match="trust: .*is no package"):
            read({"trust": [wrong]})


def test_the_registrys_own_need_none():
    assert isinstance(build("SharedWeights", {}), nn.Module)
    assert torch.is_tensor(next(build("SharedWeights", {}).parameters()))
