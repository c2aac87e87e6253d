"""Integrated gradients (Sundararajan et al. 2017)."""

from typing import Final

import numpy as np
import torch
from torch import Tensor

from layercast.models.explain.inputs import ExplainError
from layercast.models.explain.subject import Subject

MAX_STEPS: Final = 1000
"""Finding the places of the steps takes time with the cube of their number: a second here, minutes for 10,000."""


def integrated_gradients(
    subject: Subject, steps: int = 50, baseline: float | Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients along the straight line from `baseline` to the input, times their difference; and the error [N].

    `baseline` is zeros, a constant, a tensor like a row (or like all rows), or for token ids also an id. Padding is on
    both ends of the line, and so explains nothing. The integral is a Gauss-Legendre sum of `steps` points. The error
    is the sum of a row's attributions less the difference of its scores at both ends: more steps make it smaller.
    """
    if not 1 <= steps <= MAX_STEPS:
        raise ExplainError(f"steps must be from 1 to {MAX_STEPS:,}, got {steps:,}")
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    device = subject.targets.device
    place = torch.from_numpy((nodes + 1) / 2).to(device)
    weight = torch.from_numpy(weights / 2).to(device)

    def step(rows: Tensor, which: Tensor) -> Tensor:
        points = subject.points(rows)
        start = subject.baseline(baseline, points, rows)
        way = points - start
        gradients = subject.gradients(start + _like(place[which], points) * way, rows)
        return _like(weight[which], points) * gradients * way

    def end(rows: Tensor, which: Tensor) -> Tensor:
        points = subject.points(rows)
        start = subject.baseline(baseline, points, rows)
        scores = subject.scores(torch.where(_like(which, points).bool(), points, start), rows).double()
        return torch.where(which.bool(), scores, -scores)

    attributions = subject.fold(subject.summed(steps, step))
    difference = subject.summed(2, end)
    error = attributions.flatten(1).sum(dim=1, dtype=torch.float64) - difference
    return attributions, error.to(attributions.dtype)


def _like(values: Tensor, points: Tensor) -> Tensor:
    """Return `values` [n] with the dtype of `points` [n, …], broadcasting over them."""
    return values.to(points.dtype).view(-1, *[1] * (points.dim() - 1))
