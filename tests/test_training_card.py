"""What a training leaves behind: weights, card, figures and pictures."""

import inspect
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_model

from layercast.models.data import Dataset
from layercast.models.registry import build
from layercast.models.training import card, pictures
from layercast.models.training.loop import Epoch
from layercast.models.training.measure import figures
from layercast.models.training.recipes import RECIPES, recipe

HISTORY = [
    Epoch(0, 2.0, 1.5, 0.5, 0.001),
    Epoch(1, 1.0, 0.5, 0.75, 0.0005),
    Epoch(2, 0.5, 0.75, 0.8, 0.0),
]


def written(directory: Path, name: str = "mnist") -> tuple[torch.nn.Module, dict[str, object]]:
    chosen = recipe(name)
    rows = torch.zeros(30, 1)
    labels = tuple("0123456789") if name != "transformer" else ("ham", "spam")
    data = Dataset("toy data", "CC0", "nobody", labels, rows, rows[:, 0], rows[:4], rows[:4, 0])
    model = build(chosen.architecture, **chosen.arguments)
    matrix = torch.diag(torch.full((len(labels),), 3))
    matrix[0, 1] = 1
    card.write(directory, chosen, data, model, figures(matrix, labels), HISTORY)
    return model, json.loads((directory / "card.json").read_text())


def test_everything_is_written_with_the_users_own_permissions(tmp_path: Path):
    written(tmp_path / "mnist")
    names = {path.name for path in (tmp_path / "mnist").iterdir()}
    assert names == {"weights.safetensors", "card.json", "card.md", "history.json", "curves.png", "confusion.png"}
    (tmp_path / "other").touch()
    wanted = (tmp_path / "other").stat().st_mode
    assert {path.stat().st_mode for path in (tmp_path / "mnist").iterdir()} == {wanted}


@pytest.mark.parametrize("name", RECIPES)
def test_weights_load_into_the_architecture_that_the_card_names(tmp_path: Path, name: str):
    model, found = written(tmp_path, name)
    again = build(found["architecture"], **found["arguments"])
    load_model(again, str(tmp_path / "weights.safetensors"))
    states = model.state_dict(), again.state_dict()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert found["inputs"][0]["name"] == next(iter(inspect.signature(model.forward).parameters))
    assert found["outputs"] == [{"name": "logits", "datatype": "FP32", "shape": [-1, len(found["labels"])]}]


def test_the_card_says_what_it_is_and_how_good(tmp_path: Path):
    _, found = written(tmp_path)
    assert found["data"] == {
        "name": "toy data", "licence": "CC0", "source": "nobody", "train_rows": 30, "test_rows": 4,
    }  # fmt: skip
    assert found["metrics"]["accuracy"] == pytest.approx(30 / 31, abs=1e-4)
    assert found["training"]["epochs"] == 3
    assert found["training"]["best_epoch"] == 2
    assert found["training"]["validation_accuracy"] == 0.75
    text = (tmp_path / "card.md").read_text()
    assert "96.77%" in text
    assert "best epoch 2" in text
    history = json.loads((tmp_path / "history.json").read_text())
    assert [epoch["epoch"] for epoch in history] == [1, 2, 3]
    assert history[1]["validation_loss"] == 0.5


def colours(picture: Image.Image) -> set[tuple[int, ...]]:
    return {tuple(colour) for colour in np.asarray(picture.convert("RGB")).reshape(-1, 3)}


@pytest.mark.parametrize("epochs", [1, 2, 3, 120])
def test_curves_are_drawn_for_any_number_of_epochs(epochs: int):
    history = [replace(HISTORY[index % 3], epoch=index) for index in range(epochs)]
    picture = pictures.curves("toy", history)
    assert picture.size == (1080, 400)
    assert {pictures._BLUE, pictures._ORANGE} <= colours(picture)


def test_the_loss_falls_in_the_picture_as_in_the_figures():
    falling = [Epoch(index, 3.0 - index, 3.0 - index, 0.5, 0.1) for index in range(3)]
    pixels = np.asarray(pictures.curves("toy", falling))[90:, 60:520]
    blue = (pixels == pictures._BLUE).all(axis=2)
    columns = np.flatnonzero(blue.any(axis=0))
    left, right = columns[columns < columns.mean()], columns[columns > columns.mean()]
    height = lambda part: np.mean([np.flatnonzero(blue[:, column]).mean() for column in part])  # noqa: E731
    assert height(left) < height(right)


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.0, 1.0, [0.0, 0.5, 1.0]),
        (0.25, 1.5, [0.0, 0.5, 1.0, 1.5]),
        (0.96, 0.99, [0.96, 0.97, 0.98, 0.99]),
        (3.0, 3.0, [3.0, 4.0]),
        (0.0, 0.0, [0.0, 0.5]),
    ],
)
def test_ticks_are_round_and_enclose_the_values(low: float, high: float, ticks: list[float]):
    found = pictures._ticks(low, high)
    assert found == pytest.approx(ticks)


@pytest.mark.parametrize("labels", [("ham", "spam"), tuple("0123456789")])
def test_the_confusion_matrix_is_blue_on_the_diagonal_and_orange_off_it(labels: tuple[str, ...]):
    size = len(labels)
    matrix = [[8 if row == column else int(column == row + 1) for column in range(size)] for row in range(size)]
    picture = np.asarray(pictures.confusion("toy", matrix, labels)).astype(int)
    cell = (picture.shape[0] - 140) // size
    for row in range(size):
        for column in range(size):
            red, _, blue = picture[110 + row * cell + 8, 150 + column * cell + 8]
            if row == column:
                assert blue > red
            elif column == row + 1:
                assert red > blue
            else:
                assert red == blue
