"""Losses: soft Dice, focal, and the weighted sum of several tasks.

All of them read raw logits, compute in at least float32 (a sum over a mask overflows float16) and give 0 with zero
gradients, never NaN, when every target of a batch is ignored.

Logits and targets come in one of two forms, told apart by their shapes:

* one logit per target, ``logits [N, ...]`` and ``targets [N, ...]``: binary or multi-label, sigmoid inside. ``targets``
  are booleans, integers or floats in 0..1. A single channel may be left out of them: ``[N, 1, ...]`` with ``[N, ...]``.
* one logit per class, ``logits [N, C, ...]`` and integer ``targets [N, ...]`` in 0..C-1: softmax over dimension 1.

Values of targets are checked, which costs one synchronisation on a GPU: 0/255 masks are the usual silent fault.
"""

import math
from collections.abc import Callable, Sequence
from typing import Final, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layercast.models.loss_targets import at_least_float32, check_values, kept, matched, without_ignored

Reduction = Literal["mean", "sum", "none"]
Task = Literal["classification", "regression"]
IGNORE_INDEX: Final = -100
"""torch's own default: the target value that contributes neither to a loss nor to a mean's denominator."""


def dice_loss(
    logits: Tensor,
    targets: Tensor,
    smooth: float = 1.0,
    *,
    ignore_index: int | None = IGNORE_INDEX,
    reduction: Reduction = "mean",
) -> Tensor:
    """1 - (2 |A ∩ B| + smooth) / (|A| + |B| + smooth) of each sample, then ``reduction`` over samples.

    V-Net's soft Dice (Milletari et al. 2016, arXiv:1606.04797) with plain instead of squared sums in the denominator.
    Per sample, not pooled over the batch, so that one large mask can't hide a small one that was missed.

    ``logits [N, ...]`` with ``targets`` of the same shape: all positions of a sample together.
    ``logits [N, C, ...]`` with class indices ``[N, ...]``: Dice per class, mean over the C classes of a sample.
    Where mask and prediction are both empty the loss is 0, with ``smooth=0`` too.

    Gives a scalar, or ``[N]`` for ``reduction="none"``. Raises ValueError on shapes, dtypes or values that don't fit.
    """
    _check_reduction(reduction)
    if not (math.isfinite(smooth) and smooth >= 0):
        raise ValueError(f"smooth: wanted a finite number >= 0, got {smooth}")
    logits, targets = at_least_float32(logits), matched(logits, targets)
    counted = kept(targets, ignore_index)
    check_values(logits, targets, counted)
    logits, targets = without_ignored(logits, targets, counted)
    if targets.shape == logits.shape:
        scores, truth = logits.sigmoid().unsqueeze(1), targets.to(logits.dtype).unsqueeze(1)
    else:
        scores, truth = logits.softmax(1), F.one_hot(targets, logits.shape[1]).movedim(-1, 1).to(logits.dtype)
    ignored = ~counted.unsqueeze(1)
    scores, truth = (part.masked_fill(ignored, 0.0).unsqueeze(-1).flatten(2) for part in (scores, truth))
    overlap, total = (scores * truth).sum(2), scores.sum(2) + truth.sum(2) + smooth
    empty = total == 0
    dice = torch.where(empty, 1.0, (2 * overlap + smooth) / total.masked_fill(empty, 1.0))
    return _reduce((1 - dice).mean(1), reduction, count=max(1, dice.shape[0]))


class FocalLoss(nn.Module):
    """-alpha (1 - p)^gamma log p, with p the probability of the true class (Lin et al. 2017, arXiv:1708.02002).

    ``alpha``
        None: no weighting. A list or tensor: one weight per class, picked by the target; for the binary form the two
        weights are [negative, positive]. A number: in the binary form the paper's (positives weigh alpha, negatives
        1 - alpha), in the multi-class form the same factor for every class.
    ``gamma``
        0 leaves cross entropy (or binary cross entropy), times alpha.
    ``reduction``
        "mean" divides by the number of targets that aren't ignored, not by the sum of their alphas.
    ``ignore_index``
        Targets with this value give 0; None ignores nothing.

    Call with (logits, targets) in either form of the module's docstring; gives a scalar, or the targets' shape for
    ``reduction="none"``. Value and gradient are finite for any finite logits: (1 - p) is never formed by subtraction.
    """

    alpha: Tensor | None

    def __init__(
        self,
        alpha: float | Sequence[float] | Tensor | None = 0.25,
        gamma: float = 2.0,
        reduction: Reduction = "mean",
        ignore_index: int | None = IGNORE_INDEX,
    ) -> None:
        super().__init__()
        _check_reduction(reduction)
        if not (math.isfinite(gamma) and gamma >= 0):
            raise ValueError(f"gamma: wanted a finite number >= 0, got {gamma}")
        weights = None if alpha is None else _weights(alpha, "alpha")
        if weights is not None and weights.dim() == 0 and weights > 1:
            raise ValueError(f"alpha: wanted a number in 0..1 or one weight per class, got {float(weights)}")
        self.gamma, self.reduction, self.ignore_index = float(gamma), reduction, ignore_index
        self.register_buffer("alpha", weights, persistent=False)

    def extra_repr(self) -> str:
        """The arguments, as torch prints them."""
        alpha = None if self.alpha is None else self.alpha.tolist()
        return f"alpha={alpha}, gamma={self.gamma}, reduction={self.reduction}, ignore_index={self.ignore_index}"

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss of ``logits`` against ``targets``."""
        shape = targets.shape
        logits, targets = at_least_float32(logits), matched(logits, targets)
        counted = kept(targets, self.ignore_index)
        check_values(logits, targets, counted)
        logits, targets = without_ignored(logits, targets, counted)
        loss = self._binary(logits, targets) if targets.shape == logits.shape else self._multi_class(logits, targets)
        count = counted.sum().clamp(min=1)
        # reshape: a channel that the targets left out was put in, and "none" gives back the shape that came.
        return _reduce(loss.masked_fill(~counted, 0.0).reshape(shape), self.reduction, count)

    def _binary(self, logits: Tensor, targets: Tensor) -> Tensor:
        alpha = self._alpha_for(2, logits)
        if alpha is not None and alpha.dim() == 0:
            alpha = torch.stack((1 - alpha, alpha))
        targets = targets.to(logits.dtype)
        positive, negative = F.logsigmoid(logits), F.logsigmoid(-logits)
        of_positive = self._focal(positive, negative)
        of_negative = self._focal(negative, positive)
        if alpha is not None:
            of_negative, of_positive = alpha[0] * of_negative, alpha[1] * of_positive
        return targets * of_positive + (1 - targets) * of_negative

    def _multi_class(self, logits: Tensor, targets: Tensor) -> Tensor:
        alpha = self._alpha_for(logits.shape[1], logits)
        index = targets.unsqueeze(1)
        log_sum = logits.logsumexp(1)
        log_true = logits.log_softmax(1).gather(1, index).squeeze(1)
        log_rest = logits.scatter(1, index, -math.inf).logsumexp(1) - log_sum
        loss = self._focal(log_true, log_rest)
        if alpha is None:
            return loss
        return loss * (alpha if alpha.dim() == 0 else alpha[targets])

    def _focal(self, log_true: Tensor, log_rest: Tensor) -> Tensor:
        """The loss from log p and log(1 - p): the exponential has a finite gradient where (1 - p)^gamma has none."""
        if self.gamma == 0:
            return -log_true
        return -(self.gamma * log_rest).exp() * log_true

    def _alpha_for(self, classes: int, logits: Tensor) -> Tensor | None:
        if self.alpha is None:
            return None
        if self.alpha.dim() == 1 and len(self.alpha) != classes:
            raise ValueError(
                f"alpha: wanted {classes} values, one per class (for binary targets [negative, positive]), "
                f"got {len(self.alpha)} for logits {list(logits.shape)}"
            )
        return self.alpha.to(device=logits.device, dtype=logits.dtype)


class MultiTaskLoss(nn.Module):
    """Sum over tasks of weight times loss, the weights fixed or learned.

    ``criteria``
        One callable (output, target) -> scalar per task.
    ``weights``
        One number >= 0 per task, as a list or tensor; default 1 each.
    ``uncertainty``
        One of "classification" and "regression" per task turns on the learned weights of Kendall et al. 2018
        (arXiv:1705.07115, equation 10): with s = log variance, a parameter per task that starts at 0, a task adds
        exp(-s) loss + s / 2, or exp(-s) loss / 2 + s / 2 for regression, times its weight.
        Give this module's parameters to the optimiser as well.
    ``ignore_index``
        A task adds nothing (no loss, no s) in a batch where each of its targets is ignored: has this value, is NaN, or
        there are none. Its output gets zero gradients, where torch's own mean of nothing is NaN. A NaN that arises
        from real targets still shows.
    """

    weights: Tensor

    def __init__(
        self,
        criteria: Sequence[Callable[[Tensor, Tensor], Tensor]],
        weights: Sequence[float] | Tensor | None = None,
        uncertainty: Sequence[Task] | None = None,
        ignore_index: int | None = IGNORE_INDEX,
    ) -> None:
        super().__init__()
        if not criteria:
            raise ValueError("criteria: wanted at least one, got none")
        values = _weights([1.0] * len(criteria) if weights is None else weights, "weights")
        _check_count("weights", values.numel(), len(criteria))
        if uncertainty is not None:
            _check_count("uncertainty", len(uncertainty), len(criteria))
            if unknown := sorted(set(uncertainty) - set(get_args(Task))):
                raise ValueError(f"uncertainty: wanted each of {', '.join(get_args(Task))}, got {unknown}")
        self.criteria = nn.ModuleList(c if isinstance(c, nn.Module) else _Criterion(c) for c in criteria)
        self.register_buffer("weights", values.reshape(-1), persistent=False)
        self.uncertainty = None if uncertainty is None else tuple(uncertainty)
        self.log_variance = None if uncertainty is None else nn.Parameter(torch.zeros(len(criteria)))
        self.ignore_index = ignore_index

    def forward(self, outputs: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
        """The scalar total of ``outputs`` against ``targets``, one of each per task."""
        _check_count("outputs", len(outputs), len(self.criteria))
        _check_count("targets", len(targets), len(self.criteria))
        tasks = zip(outputs, targets, strict=True)
        return torch.stack([self._task(index, *task) for index, task in enumerate(tasks)]).sum()

    def _task(self, index: int, output: Tensor, target: Tensor) -> Tensor:
        if self._ignored(target):
            # Keeps the graph whole (DDP waits for every gradient), whatever the values: 0 * inf would be NaN.
            return at_least_float32(output).masked_fill(torch.ones_like(output, dtype=torch.bool), 0.0).sum()
        loss = at_least_float32(self.criteria[index](output, target))
        if loss.dim():
            raise ValueError(f"criteria[{index}]: wanted a scalar loss, got {list(loss.shape)}; use a reduction")
        if self.log_variance is not None and self.uncertainty is not None:
            log_variance = self.log_variance[index]
            factor = 0.5 if self.uncertainty[index] == "regression" else 1.0
            loss = factor * torch.exp(-log_variance) * loss + log_variance / 2
        return self.weights[index] * loss

    def _ignored(self, target: Tensor) -> bool:
        return not bool((kept(target, self.ignore_index) & ~target.isnan()).any())


class _Criterion(nn.Module):
    """A plain function among the criteria, so that all of them move and print with their module."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return self.function(output, target)


def _check_reduction(reduction: str) -> None:
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction: wanted one of {', '.join(get_args(Reduction))}, got {reduction!r}")


def _check_count(name: str, count: int, tasks: int) -> None:
    if count != tasks:
        raise ValueError(f"{name}: wanted one per task, {tasks}, got {count}")


def _weights(values: float | Sequence[float] | Tensor, name: str) -> Tensor:
    """A detached copy: a scalar or a vector of finite numbers >= 0, else ValueError."""
    weights = torch.as_tensor(values, dtype=torch.float32).detach().clone()
    if weights.dim() > 1 or not weights.numel() or not bool((weights.isfinite() & (weights >= 0)).all()):
        raise ValueError(f"{name}: wanted a number or a flat list of finite numbers >= 0, got {values}")
    return weights


def _reduce(loss: Tensor, reduction: str, count: Tensor | int) -> Tensor:
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / count
