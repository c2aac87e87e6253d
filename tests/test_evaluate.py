"""`layercast evaluate`: the zoo, an artefact and a running server give the same figures."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from serving import Running
from torch import nn

from layercast.client.main import main
from layercast.models import zoo

NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
RNG = np.random.default_rng(3)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise in the files of MNIST and of the SMS collection: untrained models answer it in all ways."""
    root = tmp_path_factory.mktemp("data")
    (root / "mnist").mkdir()
    (root / "sms_spam").mkdir()
    for part in ("train", "t10k"):
        images = RNG.integers(0, 256, (70, 28, 28)).astype(np.uint8)
        header = b"\0\0\x08\x03" + np.array(images.shape, ">u4").tobytes()
        (root / "mnist" / f"{part}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        labels = (np.arange(70) % 10).astype(np.uint8)
        (root / "mnist" / f"{part}-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01\0\0\0\x46" + labels.tobytes())
    lines = [f"{('ham', 'spam')[row % 2]}\t{'word ' * (row % 9)}number {row}" for row in range(200)]
    (root / "sms_spam" / "SMSSpamCollection").write_text("\n".join(lines))
    return root


def evaluate(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, object]:
    assert main(["evaluate", *arguments, "--json"]) == 0
    found: dict[str, object] = json.loads(capsys.readouterr().out)
    return found


def by_hand(module: nn.Module, data: Path) -> list[list[int]]:
    """The confusion matrix of an MNIST model, with numpy and one forward."""
    content = (data / "mnist" / "t10k-images-idx3-ubyte").read_bytes()
    images = np.frombuffer(content, np.uint8, offset=16).reshape(70, 1, 28, 28) / np.float32(255)
    with torch.inference_mode():
        predicted = module(torch.from_numpy(images)).argmax(dim=1).numpy()
    matrix = np.zeros((10, 10), int)
    np.add.at(matrix, (np.arange(70) % 10, predicted), 1)
    return matrix.tolist()


def test_offline_and_server_agree_with_a_forward_by_hand(
    capsys: pytest.CaptureFixture[str], data: Path, repository: Path, served: Running, modules: dict[str, nn.Module]
):
    offline = evaluate(capsys, "mnist", "--data", str(data), "--repository", str(repository))
    online = evaluate(capsys, "mnist", "--data", str(data), "--url", served.url)
    assert offline.pop("where") == str(repository)
    assert online.pop("where") == served.url
    assert offline == online
    assert offline["confusion"] == by_hand(modules["mnist"], data)
    assert offline["accuracy"] == pytest.approx(np.trace(np.array(offline["confusion"])) / 70, abs=1e-4)
    assert (offline["model"], offline["version"], offline["rows"]) == ("mnist", "1", 70)


def test_texts_are_cut_to_what_the_model_takes(
    capsys: pytest.CaptureFixture[str], data: Path, repository: Path, served: Running
):
    offline = evaluate(capsys, "transformer", "--data", str(data), "--repository", str(repository), "--version", "1")
    online = evaluate(capsys, "transformer", "--data", str(data), "--url", served.url, "--version", "1")
    assert offline["confusion"] == online["confusion"]
    assert offline["rows"] == 40


def test_people_get_a_table(capsys: pytest.CaptureFixture[str], data: Path, repository: Path):
    assert main(["evaluate", "mnist", "--data", str(data), "--repository", str(repository)]) == 0
    shown, told = capsys.readouterr()
    assert "mnist 1  accuracy" in shown
    assert shown.count("\n") == 12
    assert "70 test rows of MNIST" in told


@pytest.mark.parametrize("name", [name for name in zoo.names() if name != "resnet"])
def test_the_zoo_is_as_good_as_its_cards_say(capsys: pytest.CaptureFixture[str], data_directory: Path, name: str):
    found = evaluate(capsys, name, "--data", str(data_directory))
    card = json.loads((zoo.directory(name) / "card.json").read_text())
    assert found["accuracy"] == pytest.approx(card["metrics"]["accuracy"], abs=2e-4)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nothing", "--data", "."], 2, "invalid choice"),
        (["mnist"], 2, "required: --data"),
        (["mnist", "--data", ".", "--version", "0"], 2, "want a whole number from 1, got '0'"),
        (["mnist", "--data", ".", "--version", "2"], 2, "--version needs --repository or --url"),
        (["mnist", "--data", ".", "--url", "a:1", "--repository", "."], 2, "not allowed with"),
        (["mnist", "--data", "{data}", "--repository", "{data}"], 1, "no version with a manifest.json; export"),
        (
            ["mnist", "--data", "{data}", "--repository", "{repository}", "--version", "7"],
            1,
            "no version 7; there is 1",
        ),
        (["mnist", "--data", "{repository}", "--repository", "{repository}"], 1, "no file train-images"),
        (["resnet", "--data", "{data}", "--repository", "{repository}"], 1, "no file data_batch"),
        (["mlp", "--data", "{data}", "--url", "{url}"], 1, "NOT_FOUND"),
        (["mnist", "--data", "{data}", "--url", "127.0.0.1:1"], 1, "UNAVAILABLE"),
    ],
)
def test_what_is_wrong_is_said(
    capsys: pytest.CaptureFixture[str],
    data: Path,
    repository: Path,
    served: Running,
    arguments: list[str],
    code: int,
    message: str,
):
    places = {"data": data, "repository": repository, "url": served.url}
    assert main(["evaluate", *(argument.format(**places) for argument in arguments)]) == code
    error = capsys.readouterr().err
    assert message in error
    assert code == 2 or error.splitlines()[-1].startswith("layercast: ")


def test_a_model_of_other_classes_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, data: Path, repository: Path
):
    manifest = json.loads((repository / "mnist" / "1" / "manifest.json").read_text())
    manifest["labels"] = NAMES
    target = tmp_path / "mnist" / "1"
    target.mkdir(parents=True)
    for file in (repository / "mnist" / "1").iterdir():
        (target / file.name).symlink_to(file)
    (target / "manifest.json").unlink()
    (target / "manifest.json").write_text(json.dumps(manifest))
    assert main(["evaluate", "mnist", "--data", str(data), "--repository", str(tmp_path)]) == 1
    assert "want a model of the classes 0, 1, 2" in capsys.readouterr().err
