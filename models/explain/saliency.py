"""Explanations by the gradient at the input itself."""

import numpy as np
import torch
from torch import Tensor

from layercast.models.explain.inputs import ExplainError
from layercast.models.explain.subject import Subject


def saliency(subject: Subject) -> Tensor:
    """Absolute gradient of the score with respect to the input (Simonyan et al. 2014)."""
    return subject.fold(subject.summed(1, lambda rows, _: subject.gradients(subject.points(rows), rows)).abs())


def input_x_gradient(subject: Subject) -> Tensor:
    """Gradient times input (Shrikumar et al. 2016)."""

    def product(rows: Tensor, _: Tensor) -> Tensor:
        points = subject.points(rows)
        return points * subject.gradients(points, rows)

    return subject.fold(subject.summed(1, product))


def smoothgrad(subject: Subject, samples: int = 25, noise: float = 0.15, seed: int = 0) -> Tensor:
    """Mean gradient over `samples` noisy copies of the input (Smilkov et al. 2017): signed, absolute for token ids.

    Absolute there, because a token's gradients are summed, and behind a LayerNorm their signed sum is always zero.
    The noise is normal with a standard deviation of `noise` times the row's own range, largest less smallest value.
    Sample j adds the first values of numpy's `Generator(PCG64([seed, j])).standard_normal` in the order of the row's
    values, the same for every row, so that no row depends on its neighbours or its place among them.
    """
    if samples < 1 or noise < 0 or seed < 0:
        raise ExplainError(f"samples must be positive, noise and seed not negative, got {samples}, {noise} and {seed}")

    def noisy(rows: Tensor, which: Tensor) -> Tensor:
        points = subject.points(rows)
        mask = subject.mask_like(points, rows)
        spread = noise * _range(points, mask)
        drawn = _normal(seed, which, points)
        return subject.gradients(points + mask * spread * drawn, rows) / samples

    mean = subject.summed(samples, noisy)
    return subject.fold(mean.abs() if subject.is_tokens else mean)


def _range(points: Tensor, mask: Tensor) -> Tensor:
    """Return largest less smallest value of each row that counts, [n, 1, …]; 0 where none does."""
    high = points.masked_fill(~mask, -torch.inf).flatten(1).amax(dim=1)
    low = points.masked_fill(~mask, torch.inf).flatten(1).amin(dim=1)
    return (high - low).clamp(min=0).view(-1, *[1] * (points.dim() - 1))


def _normal(seed: int, samples: Tensor, points: Tensor) -> Tensor:
    """Return the noise of each of `samples` [n], like `points` [n, …]."""
    numbers = samples.tolist()
    streams = {each: np.random.Generator(np.random.PCG64([seed, each])) for each in numbers}
    drawn = {each: torch.from_numpy(stream.standard_normal(points.shape[1:])) for each, stream in streams.items()}
    return torch.stack([drawn[each] for each in numbers]).to(points)
