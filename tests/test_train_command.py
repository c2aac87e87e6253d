"""`layercast train`: exit codes, what it writes, and Ctrl-C."""

import gzip
import json
import signal
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from layercast.client.main import main
from layercast.models.data import digits
from layercast.models.training import checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


def write_mnist(directory: Path, rows: int = 60) -> Path:
    """An MNIST of bright spots at ten places, in the files of the real one; returns the folder for --data."""
    folder = directory / "mnist"
    folder.mkdir(parents=True)
    labels = (np.arange(rows) % 10).astype(np.uint8)
    images = np.zeros((rows, 28, 28), np.uint8)
    for image, label in zip(images, labels, strict=True):
        top, left = 6 + 11 * (label // 5), 2 + 5 * (label % 5)
        image[top : top + 5, left : left + 4] = 250
    for part in ("train", "t10k"):
        header = b"\0\0\x08\x03" + struct.pack(">3I", *images.shape)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        content = b"\0\0\x08\x01" + struct.pack(">I", rows) + labels.tobytes()
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(content))
    return directory


def train(data: Path, output: Path, *more: str) -> int:
    return main(["train", "mnist", "--data", str(data), "--output", str(output), *more])


def test_a_training_writes_everything_and_says_how_good_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert train(write_mnist(tmp_path), tmp_path / "out", "--epochs", "2") == 0
    shown = capsys.readouterr().out
    card = json.loads((tmp_path / "out" / "mnist" / "card.json").read_text())
    assert "training mnist: 60 rows of MNIST, 2 epochs on cpu" in shown
    assert "epoch 1/2  loss" in shown
    assert f"test accuracy {card['metrics']['accuracy']:.2%}" in shown
    assert card["training"]["epochs"] == 2
    assert (tmp_path / "out" / "mnist" / "checkpoint.pt").exists()


def test_the_same_seed_gives_the_same_file_and_a_second_run_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    data = write_mnist(tmp_path)
    for name in ("a", "b", "a"):
        assert train(data, tmp_path / name, "--epochs", "2", "--seed", "5") == 0
    assert "going on from" in capsys.readouterr().out
    files = [(tmp_path / name / "mnist" / "weights.safetensors").read_bytes() for name in ("a", "b")]
    assert files[0] == files[1]
    assert train(data, tmp_path / "a", "--epochs", "2", "--seed", "6", "--fresh") == 0
    assert (tmp_path / "a" / "mnist" / "weights.safetensors").read_bytes() != files[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "required: name, --data"),
        (["train", "mnist"], "required: --data"),
        (["train", "nothing", "--data", "."], "invalid choice: 'nothing'"),
        (["train", "mnist", "--data", ".", "--epochs", "0"], "must be at least 1, got 0"),
        (["train", "mnist", "--data", ".", "--epochs", "many"], "'many'"),
        (["train", "mnist", "--data", ".", "--seed", "-1"], "must be 0 to 4294967295, got -1"),
        (["train", "mnist", "--data", ".", "--precision", "float8"], "invalid choice: 'float8'"),
    ],
)
def test_bad_arguments_exit_with_2(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def assert_one_line(capsys: pytest.CaptureFixture[str], *parts: str) -> None:
    error = capsys.readouterr().err
    assert error.startswith("layercast: ")
    assert error.count("\n") == 1
    for part in parts:
        assert part in error


def test_missing_and_damaged_data_exit_with_1_and_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert train(tmp_path / "nowhere", tmp_path / "out") == 1
    assert_one_line(capsys, "no file train-images-idx3-ubyte")
    data = write_mnist(tmp_path)
    path = data / "mnist" / "t10k-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:1000])
    assert train(data, tmp_path / "out") == 1
    assert_one_line(capsys, "t10k-images-idx3-ubyte: the header says shape [60, 28, 28], 47,040 bytes", "984 follow")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_does_not_fit_exits_with_1_and_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    data = write_mnist(tmp_path)
    assert train(data, tmp_path / "out", "--epochs", "1") == 0
    capsys.readouterr()
    before = (tmp_path / "out" / "mnist" / "checkpoint.pt").read_bytes()
    assert train(data, tmp_path / "out", "--epochs", "2") == 1
    assert_one_line(capsys, "epochs 1, now 2", "use --fresh")
    assert (tmp_path / "out" / "mnist" / "checkpoint.pt").read_bytes() == before


def test_an_output_that_cannot_be_written_exits_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "out").write_text("a file")
    assert train(write_mnist(tmp_path), tmp_path / "out", "--epochs", "1") == 1
    assert_one_line(capsys, "out")


def test_ctrl_c_exits_with_130_and_keeps_the_last_good_checkpoint(tmp_path: Path):
    data, saved = write_mnist(tmp_path, rows=400), tmp_path / "out" / "mnist" / "checkpoint.pt"
    # A shell starts what it puts in the background with Ctrl-C ignored, and children inherit that.
    program = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    program += "from layercast.client.main import main; sys.exit(main())"
    command = [sys.executable, "-c", program, "train", "mnist", "--data", str(data)]
    command += ["--output", str(tmp_path / "out"), "--epochs", "5000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        while "epoch 2/" not in (line := running.stdout.readline()):
            assert line, running.stderr.read() if running.stderr else ""
        running.send_signal(signal.SIGINT)
        _, error = running.communicate(timeout=60)
    assert running.returncode == 130
    assert error.startswith("layercast: interrupted; ")
    assert "goes on from there" in error
    assert error.count("\n") == 1
    state = checkpoint.load(saved)
    assert state is not None
    assert len(state["history"]) >= 2
    assert [path.name for path in saved.parent.iterdir()] == ["checkpoint.pt"]


def test_patience_stops_early(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert train(write_mnist(tmp_path), tmp_path / "out", "--epochs", "500", "--patience", "1") == 0
    history = json.loads((tmp_path / "out" / "mnist" / "history.json").read_text())
    losses = [epoch["validation_loss"] for epoch in history]
    assert len(history) < 500
    assert losses[-2] == min(losses) < losses[-1]
    assert f"best epoch {len(history) - 1}, test accuracy" in capsys.readouterr().out


def test_digits_are_scikit_learns_enlarged_to_the_shape_of_mnist():
    data = digits.load_digits("mnist")
    small, labels = load_digits(return_X_y=True)
    assert (len(data.train_inputs), len(data.test_inputs)) == (1438, 359)
    assert data.train_inputs.shape[1:] == data.test_inputs.shape[1:] == (1, 28, 28)
    assert data.train_inputs.dtype == torch.uint8
    inputs, targets = (
        torch.cat([data.train_inputs, data.test_inputs]),
        torch.cat([data.train_targets, data.test_targets]),
    )
    assert torch.equal(torch.bincount(targets), torch.from_numpy(np.bincount(labels)))
    assert int(inputs[:, :, :4].max()) == int(inputs[:, :, :, -4:].max()) == 0
    # Bilinear: pixel i of 20 lies at (i + 1/2) · 8/20 - 1/2 of 8, and takes from the two beside it.
    places = np.clip((np.arange(20) + 0.5) * 8 / 20 - 0.5, 0, 7)
    weights = np.clip(1 - np.abs(places[:, None] - np.arange(8)), 0, None)
    wanted = weights @ (small.reshape(-1, 8, 8) / 16 * 255) @ weights.T
    middle = inputs[:, 0, 4:24, 4:24].flatten(1).double()
    distance, nearest = torch.cdist(middle, torch.from_numpy(wanted).flatten(1)).min(dim=1)
    assert sorted(nearest.tolist()) == list(range(1797)), "every digit is there once"
    assert distance.max() < 20, "of 400 pixels, each rounded by 1/2 at most"
    assert torch.equal(targets, torch.from_numpy(labels)[nearest])


def test_digits_train_a_model_that_can_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["train", "mlp", "--data", "digits", "--epochs", "4", "--output", str(tmp_path)]) == 0
    card = json.loads((tmp_path / "mlp" / "card.json").read_text())
    assert card["data"]["name"] == "scikit-learn digits"
    assert card["metrics"]["accuracy"] > 0.85
    capsys.readouterr()
    assert main(["train", "resnet", "--data", "digits", "--output", str(tmp_path)]) == 1
    assert_one_line(capsys, "stands in for mnist only, not for cifar10")


def test_digits_without_scikit_learn_say_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert main(["train", "mnist", "--data", "digits", "--output", str(tmp_path)]) == 1
    assert_one_line(capsys, "pip install 'layercast[digits]'")
