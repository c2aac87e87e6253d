"""Attention rollout as an explanation of tokens (Abnar and Zuidema 2020)."""

from collections.abc import Sequence
from typing import Final

from torch import Tensor

from layercast.models.attention_maps import AttentionExtractor, rollout
from layercast.models.explain.inputs import ExplainError
from layercast.models.explain.subject import Subject
from layercast.models.reducers import reduce

_POOLS: Final = ("mean", "cls", "last")


def attention_rollout(
    subject: Subject, layer: str | Sequence[str] = "*", pool: str = "mean", residual: float = 0.5
) -> Tensor:
    """How much the model's view of the row draws on each token, [N, T]; the same for every target.

    `layer` is a pattern over the attention layers, or several. `pool` says which tokens the model answers from: the
    `mean` over those that count, the first (`cls`) or the `last` of them. `residual` is the share of the residual
    connection. A row sums to one, unless none of its tokens counts.
    """
    if pool not in _POOLS:
        raise ExplainError(f"pool must be one of {', '.join(_POOLS)}, got {pool!r}")

    def rolled(rows: Tensor, _: Tensor) -> Tensor:
        mask = None if subject.token_mask is None else subject.token_mask[rows]
        with AttentionExtractor(subject.model, layer) as attention:
            subject.scores(subject.points(rows), rows)
            maps = list(attention.maps.values())
        try:
            return reduce(rollout(maps, mask, residual), pool, mask)
        except ValueError as error:
            raise ExplainError(f"{error}") from error

    return subject.without_padding(subject.summed(1, rolled))
