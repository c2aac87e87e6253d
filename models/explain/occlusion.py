"""Occlusion (Zeiler and Fergus 2014)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from layercast.models.explain.inputs import ExplainError
from layercast.models.explain.subject import Subject

_WINDOWS_A_SIDE = 8


def occlusion(
    subject: Subject,
    window: int | Sequence[int] | None = None,
    stride: int | Sequence[int] | None = None,
    baseline: float | Tensor | None = None,
) -> Tensor:
    """How much the score falls when a window of the input is replaced by `baseline`; needs no gradients.

    The window slides over the sizes after the channels ([H, W] of an image), over the values of a row [F] or over
    tokens; `window` and `stride` are one size for all of these or one for each, or for each of a row's dimensions with
    the channels. The default window is one token, or an eighth of each size; the default stride is the window. Where
    windows overlap, a value gets the mean of theirs; the last ones may reach over the edge. `baseline` is as in
    integrated gradients.
    """
    shape = tuple(subject.points(torch.zeros(1, dtype=torch.long, device=subject.targets.device)).shape[1:])
    slides = (0,) if subject.is_tokens or len(shape) == 1 else tuple(range(1, len(shape)))
    usual = [1 if subject.is_tokens else math.ceil(shape[dim] / _WINDOWS_A_SIDE) for dim in slides]
    sizes = _each("window", usual if window is None else window, shape, slides, shape)
    strides = _each("stride", [sizes[dim] for dim in slides] if stride is None else stride, sizes, slides, sizes)
    counts = [math.ceil((full - size) / by) + 1 for full, size, by in zip(shape, sizes, strides, strict=True)]
    before = subject.summed(1, lambda rows, _: subject.scores(subject.points(rows), rows))

    def fall(rows: Tensor, which: Tensor) -> Tensor:
        points = subject.points(rows)
        hidden = _hidden(which, shape, sizes, strides, counts)
        scores = subject.scores(torch.where(hidden, subject.baseline(baseline, points, rows), points), rows)
        difference = (before[rows] - scores).view(-1, *[1] * len(shape))
        return difference * (hidden[:, :, :1] if subject.is_tokens else hidden)

    covered = _covered(subject.targets.device, shape, sizes, strides, counts)
    total = subject.summed(math.prod(counts), fall)
    return subject.fold(total / (covered[:, :1] if subject.is_tokens else covered))


def _each(
    name: str, given: int | Sequence[int], largest: Sequence[int], slides: Sequence[int], other: Sequence[int]
) -> list[int]:
    """Return one size for each of a row's dimensions: `given` for those that the window slides along, or for all."""
    several = [given] * len(slides) if isinstance(given, int) else list(given)
    if len(several) == len(slides):
        chosen = dict(zip(slides, several, strict=True))
        several = [chosen.get(dim, size) for dim, size in enumerate(other)]
    if len(several) != len(largest) or any(not 1 <= size <= most for size, most in zip(several, largest, strict=True)):
        raise ExplainError(
            f"{name} must be a size, or {len(slides)} of them, from 1 to at most "
            f"{[largest[dim] for dim in slides]}{' (the window)' if name == 'stride' else ''}, got {given}"
        )
    return several


def _along(which: Tensor, full: int, size: int, by: int) -> Tensor:
    """Return what the windows at places `which` [n] cover along one dimension, boolean [n, full]."""
    place = torch.arange(full, device=which.device)
    start = (which * by)[:, None]
    return (place >= start) & (place < start + size)


def _hidden(
    which: Tensor, shape: Sequence[int], sizes: Sequence[int], strides: Sequence[int], counts: Sequence[int]
) -> Tensor:
    """Return which values the windows numbered `which` [n] cover, boolean [n, …row]."""
    hidden = torch.ones([len(which)] + [1] * len(shape), dtype=torch.bool, device=which.device)
    for dim in reversed(range(len(shape))):
        part = _along(which % counts[dim], shape[dim], sizes[dim], strides[dim])
        which = which // counts[dim]
        hidden = hidden & part.view(-1, *[shape[dim] if other == dim else 1 for other in range(len(shape))])
    return hidden


def _covered(
    device: torch.device, shape: Sequence[int], sizes: Sequence[int], strides: Sequence[int], counts: Sequence[int]
) -> Tensor:
    """Return how many windows cover each value of a row, […row]."""
    covered = torch.ones([1] * len(shape), device=device)
    for dim, count in enumerate(counts):
        part = _along(torch.arange(count, device=device), shape[dim], sizes[dim], strides[dim]).sum(dim=0)
        covered = covered * part.view([shape[dim] if other == dim else 1 for other in range(len(shape))])
    return covered
