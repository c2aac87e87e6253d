"""`layercast export` as a person runs it: its options, its exit codes, and what is on disk after each."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from layercast.client.main import main
from layercast.models.manifest import Manifest

NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, size: int = 3, classes: int = 2):
        super().__init__()
        self.linear = nn.Linear(size, classes)

    def forward(self, x, scale=None, **options):
        out = self.linear(x)
        return {"logits": out if scale is None else out * scale, "hidden": (x,), "nothing": None}

class Padded(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(9, 4)

    def forward(self, tokens, mask):
        weights = mask[:, :, None]
        return (self.table(tokens) * weights).sum(1) / weights.sum(1)

class Unmasked(Padded):
    def forward(self, tokens, mask):
        return self.table(tokens).mean(1) + mask.sum(1, keepdim=True) * 0

class Branching(nn.Module):
    def forward(self, x):
        return x.clamp(max=100) if (x > 100).any() else x

class Mixing(nn.Module):
    def forward(self, x):
        return x - x.mean(0, keepdim=True)

class Large(nn.Module):
    def __init__(self):
        super().__init__()
        self.inside, self.linear = nn.Linear(3, 500), nn.Linear(500, 2)
        nn.init.normal_(self.linear.weight, 0, 3e4)

    def forward(self, x):
        return self.linear(self.inside(x))

class Bare(nn.Module):
    def forward(self, *inputs):
        return inputs[0]
"""
X = ("--example", "x:float32[2,3]")


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def net(tmp_path) -> Path:
    path = tmp_path / "net.py"
    path.write_text(NET)
    return path


@pytest.fixture
def export(net, tmp_path, capsys):
    """Run the command on a class of the file; returns exit code, output lines and error lines."""

    def run(factory: str, *options: str) -> tuple[int, list[str], list[str]]:
        named = ["--file", f"{net}:{factory}"] if factory else []
        code = main(["export", *named, *options, "--output", str(tmp_path / "out")])
        printed = capsys.readouterr()
        return code, printed.out.splitlines(), printed.err.splitlines()

    return run


def written(tmp_path: Path, name: str = "net", version: int = 1) -> Manifest:
    """Return the manifest of a version after checking that it is whole, and that nothing else was left beside it."""
    directory = tmp_path / "out" / name / str(version)
    manifest = Manifest.read(directory)
    manifest.verify_files(directory)
    assert {path.name for path in directory.iterdir()} == {*manifest.files, "manifest.json"}
    assert all(path.name.isdecimal() for path in directory.parent.iterdir())
    assert (manifest.name, manifest.version) == (name, version)
    return manifest


def test_version_force_and_keep(export, tmp_path):
    code, lines, _ = export("Net", *X)
    assert code == 0
    assert any("no --weights" in line for line in lines)
    assert "output hidden left out: it is a tuple, not a tensor" in lines
    assert lines[-1].startswith(f"wrote {tmp_path / 'out' / 'net' / '1'}")
    first = written(tmp_path)
    assert [spec.name for spec in first.outputs] == ["logits"]

    assert export("Net", *X, "--arguments", '{"classes": 4}', "--version", "3")[0] == 0
    assert written(tmp_path, version=3).outputs[0].shape == (-1, 4)
    assert written(tmp_path) == first

    code, _, errors = export("Net", *X, "--arguments", '{"classes": 5}')
    assert (code, len(errors)) == (1, 1)
    assert "exists already; choose another version or pass --force" in errors[0]
    assert export("Net", *X, "--arguments", '{"classes": 5}', "--keep") == (0, [], [])
    assert written(tmp_path) == first

    assert export("Net", *X, "--arguments", '{"classes": 5}', "--force")[0] == 0
    assert written(tmp_path).outputs[0].shape == (-1, 5)
    assert written(tmp_path, version=3).outputs[0].shape == (-1, 4)

    code, _, errors = export("Mixing", *X, "--name", "net", "--force")
    assert code == 1
    assert "depends on the other rows" in errors[0]
    assert written(tmp_path).outputs[0].shape == (-1, 5), "what could not be replaced stays"


def test_the_initial_weights_are_the_same_each_time(export, tmp_path):
    for version in ("1", "2"):
        assert export("Net", *X, "--version", version)[0] == 0
    weights = [written(tmp_path, version=v).files["weights.safetensors"].sha256 for v in (1, 2)]
    assert weights[0] == weights[1]


BARRIER = """
import os, time
from pathlib import Path
from torch import nn

Path(os.environ["MEET"], str(os.getpid())).touch()
while len(os.listdir(os.environ["MEET"])) < 2:
    time.sleep(0.01)

class Net(nn.Linear):
    def __init__(self, size):
        super().__init__(size, 2)
"""


# Two processes that differ in what they export. Torch is imported once for both, and only the program that takes least is
# written: who wins does not depend on either.
TWO = """
import json, os, sys
from functools import partial
from layercast.client.main import main
from layercast.models.foreign import export

export.export_artefact = partial(export.export_artefact, programs=("torchscript",))
children = {}
for size in (3, 4):
    if not (child := os.fork()):
        sys.stdout, sys.stderr = open(os.devnull, "w"), open(f"{size}.errors", "w", buffering=1)
        options = ["--arguments", json.dumps({"size": size}), "--example", f"input:float32[2,{size}]"]
        os._exit(main(["export", "--file", "net.py:Net", *options, "--output", "out", *sys.argv[1:]]))
    children[size] = child
print(json.dumps({size: os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for size, child in children.items()}))
"""


@pytest.mark.parametrize("option", ["", "--keep", "--force"])
def test_of_two_processes_at_once_one_wins_and_the_directory_is_whole(tmp_path, option):
    """Both have found no version there before either writes one: the file makes them wait for each other."""
    (tmp_path / "net.py").write_text(BARRIER)
    (tmp_path / "meet").mkdir()

    done = subprocess.run([sys.executable, "-c", TWO, *filter(None, [option])], cwd=tmp_path, timeout=250,
                          env={"MEET": str(tmp_path / "meet"), **os.environ}, capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    ends = [(code, (tmp_path / f"{size}.errors").read_text()) for size, code in json.loads(done.stdout).items()]
    codes = sorted(code for code, _ in ends)
    errors = [error for code, error in ends if code]
    size = written(tmp_path).inputs[0].shape[1]
    assert size in (3, 4)
    if option == "--keep":
        assert codes == [0, 0]
    elif option == "":
        assert codes == [0, 1]
        assert "was written by another process meanwhile" in errors[0]
        assert len(errors[0].splitlines()) == 1
        assert size == (3, 4)[[code for code, _ in ends].index(0)]
    else:
        assert codes[0] == 0
        assert all("was written by another process meanwhile" in error for error in errors)


WRONG = {
    "nothing named": (("",), "name the models to export, or pass --all"),
    "option of the other kind": (("", "mnist", "--labels", "a"), "--labels goes with package.module:factory or --file"),
    "two things": (("Net", "mnist", *X), "one package.module:factory or one --file"),
    "all and a file": (("Net", "--all", *X), "one package.module:factory or one --file"),
    "no example": (("Net",), "describe the inputs of forward"),
    "example syntax": (("Net", "--example", "x:float32(2,3)"), "want NAME:DTYPE[SIZES]"),
    "misspelt input": (("Net", *X, "--example", "scal:float32[2,1]"), "no argument 'scal'; nearest: scale"),
    "needed input": (("Net", "--example", "scale:float32[2,1]"), "Net.forward needs x"),
    "no named input": (("Bare", *X), "Bare.forward names no argument"),
    "no such factory": (("Nett", *X), "there is no 'Nett' in it; nearest: Net"),
    "no such package": (("", "no_such_package.nets:Net", *X), "there is no module 'no_such_package' here"),
    "path as a package": (("", "nets/net.py:Net", *X), "for a file use --file"),
    "arguments": (("Net", *X, "--arguments", "{"), "--arguments: not JSON"),
    "argument list": (("Net", *X, "--arguments", "[1]"), "--arguments: want a JSON object"),
    "unknown argument": (("Net", *X, "--arguments", '{"sise": 1}'), "unexpected keyword argument 'sise'; it takes (size: int"),
    "name": (("Net", *X, "--name", "../x"), "--name: want letters"),
    "labels": (("Net", *X, "--labels", "a,,b"), "--labels: want a name for every class"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_bad_arguments_are_one_line_and_exit_two(export, tmp_path, case):
    options, message = WRONG[case]
    code, _, errors = export(*options)
    assert (code, len(errors)) == (2, 1)
    assert message in errors[0]
    assert not list((tmp_path / "out").glob("*/*"))


BAD = {
    "constructor": (("Net", *X, "--arguments", '{"size": -1}'), "net.py:Net raised RuntimeError"),
    "example does not fit": (("Net", "--example", "x:float32[2,4]"), "module 'linear' (Linear) fails on the example"),
    "no weights": (("Net", *X, "--weights", "/nonexistent/w.pt"), "/nonexistent/w.pt"),
    "kind of weights": (("Net", *X, "--weights", "w.pkl"), "w.pkl: a pickle can run any code"),
    "no labels": (("Net", *X, "--labels", "gone.txt"), "--labels: there is no file gone.txt"),
    "number of labels": (("Net", *X, "--labels", "a,b,c"), "3 labels, but no output has that many classes: logits [-1, 2]"),
    "no program": (("Branching", *X), "no program could be written: "),
    "padding": (
        ("Unmasked", "--example", "tokens:int64[2,T]{0..8 pad 0}", "--example", "mask:int64[2,T]{mask}"),
        "padding changes output 'output'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_data_is_one_line_and_exits_one(export, tmp_path, case):
    options, message = BAD[case]
    code, _, errors = export(*options)
    assert (code, len(errors)) == (1, 1)
    assert message in errors[0]
    assert not list((tmp_path / "out").glob("*/*"))


def test_labels_padding_and_defaults(export, tmp_path):
    (tmp_path / "labels.txt").write_text("north\nsouth\neast\nwest\n")
    code, *_ = export(
        "Padded", "--example", "mask:int64[2,T]{mask}", "--example", "tokens:int64[2,T<=20]{0..8 pad 0}",
        "--labels", str(tmp_path / "labels.txt"), "--description", "where to",
    )  # fmt: skip
    assert code == 0
    manifest = written(tmp_path, "padded")
    assert manifest.labels == ("north", "south", "east", "west")
    assert manifest.description == "where to"
    assert [(spec.name, spec.pad, spec.max_length) for spec in manifest.inputs] == [("tokens", 0, 20), ("mask", 0, 20)]


def test_a_whole_number_without_a_range_is_pointed_out(export):
    code, lines, _ = export("Padded", "--example", "tokens:int64[2,4]", "--example", "mask:int64[2,4]{mask}")
    assert code == 0
    assert [line for line in lines if "no value range" in line] == [
        "input tokens has no value range: a server will take any number; give one as {LOW..HIGH}"
    ]


def test_rounding_is_measured_by_the_size_of_the_values(export, tmp_path):
    code, lines, _ = export("Large", *X)
    assert code == 0
    manifest = written(tmp_path, "large")
    assert set(manifest.programs) == {"torchscript", "onnx", "exported"}
    assert max(manifest.parity["onnx"].values()) > 1e-4, "the case is one in which it matters"
    assert not [line for line in lines if "torchscript left out" in line]
