"""Reading logits and targets of a loss in either of the two forms that `losses` describes."""

import torch
from torch import Tensor


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor itself, or in float32 when it holds less."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def matched(logits: Tensor, targets: Tensor) -> Tensor:
    """Targets in one of the two forms, a left-out single channel put in. Raises ValueError on anything else."""
    if logits.dim() == 0 or not logits.is_floating_point():
        raise ValueError(f"logits: wanted floats [N, ...], got {logits.dtype} {list(logits.shape)}")
    if not targets.is_floating_point() and targets.dtype != torch.bool:
        targets = targets.long()
    if targets.shape == logits.shape:
        return targets
    per_class = logits.shape[:1] + logits.shape[2:]
    if logits.dim() < 2 or targets.shape != per_class:
        wanted = f"{list(logits.shape)} (one per logit)"
        if logits.dim() >= 2:
            wanted += f" or {list(per_class)} (class indices)"
        raise ValueError(f"targets: wanted {wanted} for logits {list(logits.shape)}, got {list(targets.shape)}")
    if logits.shape[1] == 1:
        return targets.unsqueeze(1)
    if targets.dtype != torch.int64:
        raise ValueError(f"targets: wanted integers, class indices 0..{logits.shape[1] - 1}, got {targets.dtype}")
    return targets


def kept(targets: Tensor, ignore_index: int | None) -> Tensor:
    """True where a target counts."""
    # A boolean target can't hold the index, and comparing it would turn the index into True.
    if ignore_index is None or targets.dtype == torch.bool:
        return torch.ones_like(targets, dtype=torch.bool)
    # Compared as uint8, an ignore_index of -100 would be the class 156.
    return (targets if targets.is_floating_point() else targets.long()) != ignore_index


def without_ignored(logits: Tensor, targets: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """Harmless values in the ignored places: whatever their logits are, even infinite, no gradient comes from them."""
    ignored = ~counted if counted.shape == logits.shape else ~counted.unsqueeze(1)
    return logits.masked_fill(ignored, 0.0), targets.masked_fill(~counted, 0)


def check_values(logits: Tensor, targets: Tensor, counted: Tensor) -> None:
    """Raises ValueError when a target that counts is no class, or for binary targets not in 0..1."""
    if targets.dtype == torch.bool:
        return
    binary = targets.shape == logits.shape
    top = 1 if binary else logits.shape[1] - 1
    if bool((counted & ~((targets >= 0) & (targets <= top))).any()):  # so written that NaN counts as wrong
        seen = targets[counted]
        hint = "divide a 0/255 mask by 255" if binary else f"logits {list(logits.shape)} have {top + 1} classes"
        raise ValueError(f"targets: wanted values in 0..{top}, got {seen.min().item()}..{seen.max().item()}; {hint}")
