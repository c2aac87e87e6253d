"""Test figures of a classifier: accuracy, confusion matrix, precision, recall and F1 of every class."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def logits_of(forward: Callable[[Tensor], Tensor], inputs: Tensor, batch_size: int = 256) -> Tensor:
    """Return the logits [N, C] of every row; `forward` maps rows of the data set to logits."""
    return torch.cat([forward(inputs[at : at + batch_size]) for at in range(0, len(inputs), batch_size)])


def confusion_matrix(predicted: Tensor, targets: Tensor, classes: int) -> Tensor:
    """Return counts int64 [C, C]: row = true class, column = predicted class."""
    return torch.bincount(targets * classes + predicted, minlength=classes * classes).reshape(classes, classes)


def figures(matrix: Tensor, labels: tuple[str, ...]) -> dict[str, Any]:
    """Return accuracy, and precision, recall and F1 a class, from a confusion matrix [C, C]."""
    hits = matrix.diagonal().double()
    precision = hits / matrix.sum(dim=0).clamp(min=1)
    recall = hits / matrix.sum(dim=1).clamp(min=1)
    f1 = 2 * precision * recall / (precision + recall).clamp(min=1e-12)
    classes = {
        label: {"precision": round(float(p), 4), "recall": round(float(r), 4), "f1": round(float(f), 4)}
        for label, p, r, f in zip(labels, precision, recall, f1, strict=True)
    }
    return {"accuracy": round(float(hits.sum() / matrix.sum()), 4), "classes": classes, "confusion": matrix.tolist()}
