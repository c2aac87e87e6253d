"""`layercast models show`: its numbers against hand-computed ones, what it can be asked for, what it refuses."""

import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from layercast.client.main import main
from layercast.models import zoo

pytestmark = pytest.mark.usefixtures("one_thread")

Capture = pytest.CaptureFixture[str]


def shown(capsys: Capture, *arguments: str) -> dict[str, Any]:
    assert main(["models", "show", *arguments, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    found["by path"] = {row["path"]: row for row in found["rows"]}
    return found


def dense(*sizes: int) -> tuple[int, int]:
    """Parameters (weights, biases, and two of a norm per hidden unit) and multiply-adds of a perceptron."""
    pairs = list(itertools.pairwise(sizes))
    return sum(a * b + b for a, b in pairs) + 2 * sum(sizes[1:-1]), sum(a * b for a, b in pairs)


def convolutions(*layers: tuple[int, int, int, int]) -> tuple[int, int]:
    """The same of convolutions (in, out, kernel, side of the output) without biases, each with a norm."""
    weights = [a * b * k * k for a, b, k, _ in layers]
    return sum(weights) + 2 * sum(b for _, b, _, _ in layers), sum(
        weight * layer[3] ** 2 for weight, layer in zip(weights, layers, strict=True)
    )


def encoder(tokens: int, size: int = 64, wide: int = 128, blocks: int = 2) -> tuple[int, int]:
    """Embeddings of 257 tokens and 192 positions, blocks with 4 projections and a feed-forward, a norm, a head of 2."""
    block = 4 * (size * size + size) + (size * wide + wide) + (wide * size + size) + 4 * size
    products = 2 * tokens * tokens * size  # queries by keys, weights by values, over all heads
    work = 4 * tokens * size * size + products + 2 * tokens * size * wide
    return (257 + 192) * size + blocks * block + 2 * size + 2 * size + 2, blocks * work + 2 * size


BLOCKS = [(64, 64, 3, 32)] * 4 + [(64, 128, 3, 16), (64, 128, 1, 16)] + [(128, 128, 3, 16)] * 3
RESNET = convolutions((3, 64, 3, 32), *BLOCKS)
BY_HAND = {
    "mnist": (dense(784, 512, 256, 10), [1, 1, 28, 28]),
    "mlp": (dense(784, 512, 256, 128, 10), [1, 784]),
    "resnet": ((RESNET[0] + 1290, RESNET[1] + 1280), [1, 3, 32, 32]),
    "transformer": (encoder(tokens=192), [1, 192]),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_every_model_of_the_zoo_by_hand(capsys: Capture, name: str):
    found, ((parameters, multiply_adds), shape) = shown(capsys, name), BY_HAND[name]
    assert found["model"] == name
    assert list(found["inputs"].values()) == [shape]
    assert (found["parameters"], found["multiply_adds"]) == (parameters, multiply_adds)
    assert (found["trainable"], found["frozen"]) == (parameters, 0)
    for column in ("trainable", "frozen", "buffers", "multiply_adds"):
        assert sum(row[column] for row in found["rows"]) == found[column]


def test_the_zoo_is_known_by_its_names():
    assert set(BY_HAND) == set(zoo.names())


def test_shapes_and_multiply_adds_follow_the_example(capsys: Capture):
    found = shown(capsys, "transformer", "--example", "tokens:int64[3,50]")
    assert found["multiply_adds"] == 3 * encoder(tokens=50)[1]
    attention = found["by path"]["blocks.0.attn"]
    assert (attention["type"], attention["output"]) == ("MultiHeadAttention", "[3, 50, 64]")
    assert attention["multiply_adds"] == 3 * 2 * 50 * 50 * 64
    assert found["by path"]["blocks.0.attn.weights"]["output"] == "[3, 4, 50, 50]"


def test_an_architecture_with_arguments(capsys: Capture):
    found = shown(capsys, "MLP", "--arguments", '{"input_size": 6, "hidden_sizes": [5], "output_size": 3}')
    assert (found["parameters"], found["multiply_adds"]) == dense(6, 5, 3)
    assert found["inputs"] == {"x": [1, 6]}
    assert found["by path"]["hidden.0.1"]["buffers"] == 5 + 5 + 1


@pytest.mark.parametrize("name", ["SimpleNet", "MLP", "MNISTClassifier", "ResNetLike", "TransformerEncoder"])
def test_every_architecture_needs_no_example(capsys: Capture, name: str):
    assert shown(capsys, name)["rows"][0]["type"] == name


def test_shared_weights_count_once(capsys: Capture):
    found = shown(capsys, "SharedWeights")
    assert found["parameters"] == 110
    assert found["by path"]["shared"]["note"] == "called 2 times"
    assert found["multiply_adds"] == 200


class Tied(nn.Module):
    def __init__(self, words: int = 7) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, 4)
        self.norm = nn.LayerNorm(4).requires_grad_(False)
        self.head = nn.Linear(4, words, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, words, keep):
        return {"logits": self.head(self.norm(self.embed(words))), "keep": keep}


def test_any_factory_with_several_inputs_frozen_and_tied_weights(capsys: Capture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "somebodys", sys.modules[__name__])
    examples = ["--example", "words:int64[2,5]", "--example", "keep: bool[2, 5]"]
    found = shown(capsys, "somebodys:Tied", "--arguments", '{"words": 9}', *examples)
    assert (found["trainable"], found["frozen"]) == (36, 8)
    assert found["by path"]["head"]["note"] == "weight shared with embed.weight"
    assert found["rows"][0]["output"] == "{logits: [2, 5, 9], keep: [2, 5]}"
    assert found["inputs"] == {"words": [2, 5], "keep": [2, 5]}


def test_an_artefact_and_a_trained_model(capsys: Capture, repository: Path):
    found = shown(capsys, str(repository / "resnet" / "1"))
    assert found["parameters"] == BY_HAND["resnet"][0][0]
    assert found["described"] == "artefact resnet 1, ResNetLike"
    assert shown(capsys, str(zoo.directory("mlp")))["parameters"] == BY_HAND["mlp"][0][0]


def lines(capsys: Capture, *arguments: str) -> list[str]:
    assert main(["models", "show", *arguments]) == 0
    return capsys.readouterr().out.splitlines()


def test_children_against_modules(capsys: Capture):
    every, children = lines(capsys, "mnist"), lines(capsys, "mnist", "--depth", "1")
    assert "mnist of the zoo, MNISTClassifier" in children[0]
    tree = [line.split()[:2] for line in children[4:-6]]
    assert tree == [["(model)", "MNISTClassifier"], ["flatten", "Flatten"], ["net", "Sequential"]]
    # What lies below the last level is added to it, so the sums stay.
    assert children[6].split()[-4:] == ["537,354", "-", "1,538", "535,040"]
    assert children[-5:] == every[-5:]
    assert every[-5:-3] == [
        "children       2 (named_children)",
        "modules        14 (named_modules, with the model itself)",
    ]
    assert len(every) == len(children) + 11
    assert "    weight [512, 784] float32 trainable" in "\n".join(lines(capsys, "mnist", "--parameters"))


def complaint(capsys: Capture, code: int, *arguments: str) -> str:
    assert main(["models", "show", *arguments]) == code
    out, error = capsys.readouterr()
    assert out == ""
    return error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnt"], "no model, architecture or folder 'resnt'; nearest: resnet"),
        (["ResNetLiek"], "nearest: ResNetLike"),
        (["."], "holds neither manifest.json (an artefact) nor card.json"),
        (["MLP", "--arguments", '{"widths": 3}'], "architecture MLP: "),
        (["MLP", "--arguments", '{"dropout": 2}'], "MLP: dropout must be at least 0 and below 1, got 2"),
        (["MLP", "--arguments", "[1]"], "want a JSON object"),
        (["MLP", "--arguments", "{"], "not JSON"),
        (["mlp", "--arguments", '{"dropout": 0.5}'], "mlp is built as its card or manifest says"),
        (["mlp", "--depth", "-1"], "want a whole number from 0, got '-1'"),
        (["torch.nn:ReLU"], "torch.nn:ReLU, untrained doesn't say what it takes; say it with --example"),
        (["torch.nn:Relu", "--example", "x:float32[1]"], "torch.nn:Relu: there is no 'Relu' in it"),
        (["no.such:Net"], "there is no module 'no' here"),
        (["mlp", "--example", "x:float33[1]"], "no datatype 'float33'; nearest: float32"),
        (["mlp", "--example", "x:float32[2,T]"], "want a number for every size"),
        (["mlp", "--example", "float32[1]"], "want NAME:DTYPE[SIZES]"),
        (["mlp", "--example", "x:float32[1,2]", "--example", "x:float32[1,2]"], "input x is described twice"),
    ],
)  # fmt: skip
def test_wrong_names_and_arguments_exit_with_2(capsys: Capture, arguments: list[str], message: str):
    assert message in complaint(capsys, 2, *arguments)


@pytest.mark.parametrize("example", ["x:float32[1,3]", "y:float32[1,784]", "x:int64[1,784]"])
def test_inputs_that_a_model_cannot_take_exit_with_1_and_one_line(capsys: Capture, example: str):
    error = complaint(capsys, 1, "mlp", "--example", example)
    name = example.partition(":")[0]
    assert error.startswith(f"layercast: mlp of the zoo, MLP can't run on {name} [1, ")
    assert "say inputs with --example" in error
    assert error.count("\n") == 1


def test_damaged_files_exit_with_1(capsys: Capture, repository: Path, tmp_path: Path):
    folder = tmp_path / "1"
    shutil.copytree(repository / "shared" / "1", folder)
    content = bytearray((folder / "weights.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "weights.safetensors").write_bytes(content)
    assert "weights.safetensors: sha256" in complaint(capsys, 1, str(folder))
    (folder / "manifest.json").write_text("{}")
    assert "manifest.json: schema_version" in complaint(capsys, 1, str(folder))


def test_it_is_a_verb_of_two_words_beside_models(capsys: Capture):
    assert main(["models", "shwo", "mnist"]) == 2
    assert "no verb 'models shwo'; did you mean models show?" in capsys.readouterr().err
    assert main(["models", "show"]) == 2
    assert "required: name" in capsys.readouterr().err
    assert main(["models", "--help"]) == 0
    assert "`layercast models show NAME`" in capsys.readouterr().out


def test_help_waits_for_no_torch():
    code = "import sys; from layercast.client.main import main; main(['models', 'show', '--help']); "
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0
