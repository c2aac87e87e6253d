"""Optimiser and learning rate of a recipe."""

import math

import torch
from torch import nn

from layercast.models.training.recipes import Recipe

_LONGEST_WARMUP = 0.3


def optimiser(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """Return SGD with Nesterov momentum or AdamW, decaying the matrices and kernels of `model` only."""
    # Norms and biases are not decayed: they set scales, not directions.
    decayed = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    plain = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    if recipe.optimiser == "sgd":
        return torch.optim.SGD(groups, lr=recipe.learning_rate, momentum=0.9, nesterov=True)
    return torch.optim.AdamW(groups, lr=recipe.learning_rate)


def learning_rate(recipe: Recipe, progress: float) -> float:
    """Return the rate after `progress` epochs: a linear warm-up, then a cosine to zero (Loshchilov and Hutter 2017).

    A warm-up longer than 0.3 of the training is cut to that, so that short trials reach the full rate too.
    """
    warmup = min(recipe.warmup_epochs, _LONGEST_WARMUP * recipe.epochs)
    if progress < warmup:
        return recipe.learning_rate * progress / warmup
    rest = (progress - warmup) / (recipe.epochs - warmup)
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, rest)))
