"""What goes into an explanation and comes out of the model: inputs, the explained output, targets, padding."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from layercast.models.hook_points import flatten_output
from layercast.models.layer_names import nearest


class ExplainError(ValueError):
    """The explanation that was asked for can't be given, by this method, of this model, or on these inputs."""


class Inputs:
    """The tensors of a call, batch first: one, several by position, or several by name. `of` is the explained one.

    Without `of` it is the only one, the only float one, or where there is none the first.
    """

    def __init__(self, given: Tensor | Sequence[Tensor] | Mapping[str, Tensor], of: str | None = None) -> None:
        if isinstance(given, Mapping):
            self._tensors = dict(given)
        else:
            several = [given] if isinstance(given, Tensor) else given
            self._tensors = {str(position): tensor for position, tensor in enumerate(several)}
        self._by_name = isinstance(given, Mapping)
        self._check()
        self.of = self._chosen(of)
        self.attributed = self._tensors[self.of].detach()
        self.rows = len(self.attributed)

    def call(self, model: nn.Module, rows: Tensor, explained: Tensor | None) -> Any:
        """Run `model` on copies of `rows` (indices), with `explained` in place of the explained input unless None."""
        chosen = {name: tensor[rows] for name, tensor in self._tensors.items()}
        if explained is not None:
            chosen[self.of] = explained
        return model(**chosen) if self._by_name else model(*chosen.values())

    def _check(self) -> None:
        if not self._tensors:
            raise ExplainError("no inputs are given")
        for name, tensor in self._tensors.items():
            if not isinstance(tensor, Tensor) or not tensor.dim():
                raise ExplainError(f"input {name!r} must be a tensor with rows along its first dimension")
        sizes = {name: len(tensor) for name, tensor in self._tensors.items()}
        if len(set(sizes.values())) > 1:
            raise ExplainError(f"inputs must have the same number of rows, got {sizes}")
        if 0 in sizes.values():
            raise ExplainError("there is nothing to explain: the inputs have no rows")

    def _chosen(self, of: str | None) -> str:
        if of is not None:
            if of not in self._tensors:
                raise ExplainError(
                    f"no input {of!r}{nearest(of, self._tensors.keys())}; known: {', '.join(self._tensors)}"
                )
            return of
        floats = [name for name, tensor in self._tensors.items() if tensor.is_floating_point()]
        if len(floats) > 1:
            raise ExplainError(f"several inputs could be explained: {', '.join(floats)}; say which: of={floats[0]!r}")
        return (floats or list(self._tensors))[0]


def pick_output(result: Any, wanted: str | None, rows: int) -> Tensor:
    """Return the output [rows, C] that is explained: the first tensor, or the part called `wanted`, of `result`."""
    parts = {part: tensor for part, tensor in flatten_output(result) if tensor.is_floating_point()}
    chosen = (
        next(iter(parts), None) if wanted is None else next((p for p in parts if p in (wanted, f"[{wanted}]")), None)
    )
    if chosen is None:
        raise ExplainError(
            f"the model returns no float tensor {'' if wanted is None else repr(wanted)}; it returns "
            f"{', '.join(parts) or type(result).__name__}"
        )
    output = parts[chosen]
    if output.dim() == 1:
        output = output[:, None]
    if output.dim() != 2 or output.shape[0] != rows:
        raise ExplainError(
            "an explanation is of one score a row: want an output [N] or [N, C], "
            f"got {list(output.shape)} for {rows} rows"
        )
    return output


def checked_targets(given: int | Sequence[int] | Tensor, rows: int, classes: int) -> Tensor:
    """Return the class index that each row is explained for, int64 [rows], from one index or one for each row."""
    targets = torch.as_tensor(given)
    if targets.dtype.is_floating_point or targets.dtype == torch.bool:
        raise ExplainError(f"targets must be class indices, got {targets.dtype}")
    if targets.dim() and targets.shape != (rows,):
        raise ExplainError(
            f"targets must be one class index, or one for each of {rows} rows, got {list(targets.shape)}"
        )
    wrong = targets[(targets < 0) | (targets >= classes)]
    if len(wrong):
        raise ExplainError(
            f"target {int(wrong[0])} is out of range: the output has {classes} classes, 0 to {classes - 1}"
        )
    return targets.to(torch.long).expand(rows)


def token_mask_for(inputs: Inputs, embedding: nn.Embedding | None, given: Tensor | None) -> Tensor | None:
    """Return which tokens count, boolean [N, T]: as `given`, or all but the Embedding's own padding id."""
    ids = inputs.attributed
    if given is not None:
        if given.dtype != torch.bool or given.shape != ids.shape[:2]:
            raise ExplainError(
                f"token_mask must be boolean {list(ids.shape[:2])}, got {given.dtype} {list(given.shape)}"
            )
        return given.to(ids.device)
    return None if embedding is None or embedding.padding_idx is None else ids != embedding.padding_idx
