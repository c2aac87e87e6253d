"""The training loop on tiny made-up data: it learns, repeats itself exactly, and goes on after interruptions."""

import logging
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from layercast.models.data import Dataset
from layercast.models.training import loop
from layercast.models.training.checkpoint import CheckpointError
from layercast.models.training.loop import Epoch, Options, Run, TrainingError, best_epoch, train
from layercast.models.training.recipes import Recipe, recipe

CPU = torch.device("cpu")
DIGITS = replace(recipe("mnist"), epochs=4, batch_size=16, validation=0.2)


pytestmark = pytest.mark.usefixtures("one_thread")


def spots(rows: int = 80) -> Dataset:
    """Images of class k with a bright spot at one of ten places, under noise; the test part is the training part."""
    generator = torch.Generator().manual_seed(5)
    targets = torch.arange(rows) % 10
    images = torch.randint(0, 60, (rows, 1, 28, 28), generator=generator, dtype=torch.uint8)
    for row, target in enumerate(targets.tolist()):
        top, left = 6 + 11 * (target // 5), 2 + 5 * (target % 5)
        images[row, 0, top : top + 5, left : left + 4] = 250
    return Dataset("spots", "none", "made up", tuple("0123456789"), images, targets, images, targets)


def texts(rows: int = 60) -> Dataset:
    """Messages of various lengths; spam has capitals."""
    targets = torch.arange(rows) % 2
    tokens = torch.full((rows, 24), 256)
    for row, target in enumerate(targets.tolist()):
        tokens[row, : 4 + row % 20] = 65 + row % 26 if target else 97 + row % 26
    return Dataset("texts", "none", "made up", ("ham", "spam"), tokens, targets, tokens, targets)


def run(chosen: Recipe, data: Dataset, checkpoint: Path | None = None, **hooks: object) -> Run:
    on_step, on_epoch = hooks.get("on_step", lambda *_: None), hooks.get("on_epoch", lambda _: None)
    return train(chosen, data, Options(CPU, checkpoint=checkpoint), on_step, on_epoch)


def assert_same(one: Run, other: Run) -> None:
    assert one.history == other.history
    states = one.model.state_dict(), other.model.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_it_learns_and_reports_every_step_and_epoch():
    steps: list[tuple[int, int, int]] = []
    epochs: list[Epoch] = []
    data = spots(200)
    trained = run(replace(DIGITS, epochs=8), data, on_step=lambda *step: steps.append(step), on_epoch=epochs.append)
    assert steps == [(epoch, step, 10) for epoch in range(8) for step in range(10)]
    assert epochs == trained.history
    assert [epoch.epoch for epoch in epochs] == list(range(8))
    assert epochs[-1].loss < epochs[0].loss / 2
    predicted = loop.evaluate(DIGITS, trained.model, data.test_inputs, CPU).argmax(dim=1)
    assert (predicted == data.test_targets).double().mean() > 0.9


@pytest.mark.parametrize("name", ["mlp", "transformer", "resnet"])
def test_every_recipe_trains_a_model_of_its_own(name: str):
    chosen = replace(recipe(name), epochs=2, batch_size=8, validation=0.2)
    data = spots(20)
    if name == "transformer":
        small = {"max_length": 24, "embed_dim": 8, "num_heads": 2, "ff_dim": 8, "num_blocks": 1}
        chosen, data = replace(chosen, arguments=small), texts()
    if name == "resnet":
        pictures = functional.pad(data.train_inputs, (2, 2, 2, 2)).expand(-1, 3, -1, -1).contiguous()
        data = replace(data, train_inputs=pictures, test_inputs=pictures)
    once, twice = run(chosen, data), run(chosen, data)
    assert_same(once, twice)
    assert all(math.isfinite(epoch.validation_loss) for epoch in once.history)
    assert loop.evaluate(chosen, once.model, data.test_inputs, CPU).shape == (len(data.test_inputs), len(data.labels))


def test_the_same_seed_gives_the_same_weights_and_another_does_not():
    data = spots()
    assert_same(run(DIGITS, data), run(DIGITS, data))
    other = run(replace(DIGITS, seed=1), data)
    assert not torch.equal(
        other.model.state_dict()["net.4.weight"], run(DIGITS, data).model.state_dict()["net.4.weight"]
    )


def test_the_callers_random_state_is_left_alone():
    torch.manual_seed(11)
    wanted = torch.rand(3)
    torch.manual_seed(11)
    run(replace(DIGITS, epochs=1), spots(40))
    assert torch.equal(torch.rand(3), wanted)


class Stop(Exception):
    """Stands for whatever ends a training early."""


@pytest.mark.parametrize("moment", ["after an epoch", "within an epoch", "in the first epoch"])
def test_an_interrupted_and_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, moment: str):
    data, path = spots(), tmp_path / "checkpoint.pt"
    whole = run(DIGITS, data)

    def on_epoch(epoch: Epoch) -> None:
        if moment == "after an epoch" and epoch.epoch == 1:
            raise Stop

    def on_step(epoch: int, step: int, _: int) -> None:
        if (moment, epoch, step) in (("within an epoch", 2, 1), ("in the first epoch", 0, 2)):
            raise Stop

    with pytest.raises(Stop):
        run(DIGITS, data, path, on_epoch=on_epoch, on_step=on_step)
    done: list[Epoch] = []
    resumed = run(DIGITS, data, path, on_epoch=done.append)
    assert len(done) == {"after an epoch": 2, "within an epoch": 2, "in the first epoch": 4}[moment]
    assert_same(whole, resumed)


def test_a_finished_run_is_not_trained_again(tmp_path: Path):
    data, path = spots(40), tmp_path / "checkpoint.pt"
    first = run(DIGITS, data, path)
    done: list[Epoch] = []
    assert_same(first, run(DIGITS, data, path, on_epoch=done.append))
    assert done == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 5}, "epochs 4, now 5"),
        ({"seed": 3, "learning_rate": 0.5}, "learning_rate 0.002, now 0.5; seed 0, now 3"),
        ({"arguments": {"dropout": 0.3}}, "arguments"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path, changes: dict[str, object], message: str):
    data, path = spots(40), tmp_path / "checkpoint.pt"
    run(DIGITS, data, path)
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match=message):
        run(replace(DIGITS, **changes), data, path)
    assert path.read_bytes() == before


def test_a_checkpoint_of_other_data_or_of_another_program_is_refused(tmp_path: Path):
    path = tmp_path / "checkpoint.pt"
    run(DIGITS, spots(40), path)
    with pytest.raises(CheckpointError, match="other training data; use --fresh"):
        run(DIGITS, spots(50), path)
    torch.save({"model": {}}, path)
    with pytest.raises(CheckpointError, match="want a checkpoint of ours"):
        run(DIGITS, spots(40), path)


def epoch(number: int, validation_loss: float) -> Epoch:
    return Epoch(number, 1.0, validation_loss, 0.5, 0.1)


def test_the_best_epoch_has_the_lowest_validation_loss_and_ties_go_to_the_later():
    assert best_epoch([epoch(0, 0.5), epoch(1, 0.2), epoch(2, 0.4)]) == 1
    assert best_epoch([epoch(0, 0.2), epoch(1, 0.3), epoch(2, 0.2)]) == 2


def scripted(monkeypatch: pytest.MonkeyPatch, losses: list[float]) -> list[dict[str, torch.Tensor]]:
    """Let validation give `losses`, and keep the weights that it saw."""
    seen: list[dict[str, torch.Tensor]] = []

    def validate(_recipe: Recipe, model: nn.Module, *_: object) -> tuple[float, float]:
        seen.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return losses[len(seen) - 1], 0.5

    monkeypatch.setattr(loop, "_validate", validate)
    return seen


@pytest.mark.parametrize(("patience", "epochs"), [(0, 6), (1, 3), (2, 6)])
def test_training_stops_after_so_many_epochs_without_improvement(
    monkeypatch: pytest.MonkeyPatch, patience: int, epochs: int
):
    scripted(monkeypatch, [0.5, 0.3, 0.4, 0.3, 0.6, 0.7])
    assert len(run(replace(DIGITS, epochs=6, patience=patience), spots(40)).history) == epochs


def test_the_weights_are_those_of_the_best_epoch_even_when_resumed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    seen = scripted(monkeypatch, [0.5, 0.1, 0.2, 0.3])
    trained = run(DIGITS, spots(40), tmp_path / "checkpoint.pt")
    resumed = run(DIGITS, spots(40), tmp_path / "checkpoint.pt")
    for finished in (trained, resumed):
        state = finished.model.state_dict()
        assert all(torch.equal(state[name], seen[1][name]) for name in state)
        assert not torch.equal(state["net.4.weight"], seen[3]["net.4.weight"])


def test_validation_and_test_rows_are_never_trained_on(monkeypatch: pytest.MonkeyPatch):
    data = spots(60)
    marked = data.train_inputs.clone()
    marked[:, 0, 0, 0] = torch.arange(60)
    data = replace(data, train_inputs=marked, test_inputs=data.test_inputs.fill_(200))
    used: set[int] = set()

    def spy(_: Recipe, rows: torch.Tensor, *__: object) -> torch.Tensor:
        used.update(rows[:, 0, 0, 0].tolist())
        return rows.float() / 255

    monkeypatch.setattr(loop, "_augmented", spy)
    run(replace(DIGITS, batch_size=6, validation=0.2), data)
    # Every class has 6 rows, of which 0.2 is 1: 50 rows are left to train on.
    assert len(used) == 50
    assert 200 not in used


def test_a_batch_whose_targets_are_all_ignored_is_skipped_and_logged(caplog: pytest.LogCaptureFixture):
    """User report O40: torch's mean over no target is NaN, which would spoil every weight."""
    data = spots(40)
    ignored = replace(data, train_targets=torch.full((40,), loop.IGNORED))
    ignored.train_targets[:4] = 1
    with caplog.at_level(logging.WARNING):
        trained = run(replace(DIGITS, batch_size=2), ignored)
    assert "every target is to be ignored; the batch is skipped" in caplog.text
    assert all(torch.isfinite(tensor).all() for tensor in trained.model.state_dict().values())
    assert all(math.isfinite(epoch.loss) and math.isfinite(epoch.validation_loss) for epoch in trained.history)


def test_a_loss_that_is_no_number_ends_training_with_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "checkpoint.pt"
    monkeypatch.setattr(loop, "_step", lambda *_: torch.tensor(math.nan))
    with pytest.raises(TrainingError, match="the loss became nan in epoch 1; lower the learning rate"):
        run(DIGITS, spots(40), path)
    assert not path.exists()


class Fixed(nn.Module):
    """Gives logits that do not depend on the input, but on a parameter, so that there is something to train."""

    def __init__(self, logits: list[float]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.logits.expand(len(rows), -1)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_label_smoothing_and_clipping(smoothing: float):
    """Probabilities 1/2, 1/6, 1/6, 1/6 and the first class for half the rows, the second for the others."""
    model = Fixed([math.log(3), 0.0, 0.0, 0.0])
    chosen = replace(DIGITS, label_smoothing=smoothing, gradient_clip=0.01)
    trained = Run(model, torch.optim.SGD(model.parameters(), lr=1.0), [], {})
    before = model.logits.detach().clone()
    loss = loop._step(chosen, trained, Options(CPU), torch.zeros(2, 1), torch.tensor([0, 1]))
    # Mean of -log(1/2) and -log(1/6), = log 12 / 2; smoothing mixes in the mean over classes, (log 2 + 3 log 6) / 4.
    plain, uniform = math.log(12) / 2, (math.log(2) + 3 * math.log(6)) / 4
    assert float(loss) == pytest.approx((1 - smoothing) * plain + smoothing * uniform, rel=1e-6)
    assert float((model.logits.detach() - before).norm()) == pytest.approx(0.01, rel=1e-3)


def test_bfloat16_forward_keeps_float32_weights_and_learns():
    trained = train(DIGITS, spots(), Options(CPU, torch.bfloat16), lambda *_: None, lambda _: None)
    assert {parameter.dtype for parameter in trained.model.parameters()} == {torch.float32}
    assert trained.history[-1].loss < trained.history[0].loss


def test_fewer_rows_than_a_batch_still_train():
    trained = run(replace(DIGITS, epochs=2, batch_size=512), spots(40))
    assert len(trained.history) == 2
