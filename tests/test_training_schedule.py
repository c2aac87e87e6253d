"""Learning rates and optimisers against values worked out by hand."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from layercast.models.training.recipes import Recipe, recipe
from layercast.models.training.schedule import learning_rate, optimiser

BASE = replace(recipe("mnist"), epochs=10, learning_rate=0.8, warmup_epochs=2.0)


@pytest.mark.parametrize(
    ("progress", "rate"),
    [
        (0.0, 0.0),
        (0.5, 0.2),
        (1.0, 0.4),
        (1.99, 0.796),
        (2.0, 0.8),  # cos 0 = 1
        (14 / 3, 0.6),  # a third of the way down: cos 60° = 1/2
        (6.0, 0.4),  # half way: cos 90° = 0
        (22 / 3, 0.2),  # two thirds: cos 120° = -1/2
        (10.0, 0.0),
        (11.0, 0.0),
    ],
)
def test_a_linear_warm_up_then_half_a_cosine(progress: float, rate: float):
    assert learning_rate(BASE, progress) == pytest.approx(rate, abs=1e-12)


@pytest.mark.parametrize(
    ("changes", "progress", "rate"),
    [
        ({"warmup_epochs": 0.0}, 0.0, 0.8),
        ({"warmup_epochs": 0.0}, 5.0, 0.4),
        ({"epochs": 1}, 0.15, 0.4),  # a warm-up of 2 epochs in a training of 1 takes 0.3
        ({"epochs": 1}, 0.3, 0.8),
        ({"epochs": 1}, 1.0, 0.0),
    ],
)
def test_short_trainings_and_no_warm_up(changes: dict[str, float], progress: float, rate: float):
    assert learning_rate(replace(BASE, **changes), progress) == pytest.approx(rate, abs=1e-12)


def stepped(chosen: Recipe) -> tuple[float, float]:
    """Weight (from 2) and bias (from 1) after one step in which both have the gradient 0.5."""
    model = nn.Linear(1, 1)
    with torch.no_grad():
        model.weight.fill_(2.0)
        model.bias.fill_(1.0)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    optimiser(chosen, model).step()
    return model.weight.item(), model.bias.item()


def test_sgd_takes_a_nesterov_step_and_decays_weights_only():
    weight, bias = stepped(replace(BASE, optimiser="sgd", learning_rate=0.1, weight_decay=0.2))
    # The gradient of the weight is 0.5 + 0.2·2 = 0.9; Nesterov's first step is (1 + momentum) times it.
    assert weight == pytest.approx(2 - 0.1 * 1.9 * 0.9)
    assert bias == pytest.approx(1 - 0.1 * 1.9 * 0.5)


def test_adamw_steps_by_the_rate_and_decays_weights_only():
    weight, bias = stepped(replace(BASE, optimiser="adamw", learning_rate=0.1, weight_decay=0.2))
    # Adam's first step is the rate itself, whatever the gradient; the decay, 0.1·0.2 of the weight, is apart from it.
    assert weight == pytest.approx(2 * (1 - 0.1 * 0.2) - 0.1, rel=1e-6)
    assert bias == pytest.approx(1 - 0.1, rel=1e-6)
