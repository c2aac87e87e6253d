"""Which rows make up the batches of an epoch."""

import torch
from torch import Tensor

_POOL = 20
"""Batches that rows are sorted by length within: enough for little padding, few enough to keep batches random."""


def batches(count: int, size: int, generator: torch.Generator) -> list[Tensor]:
    """Return row numbers of shuffled batches of `size`; the incomplete last one is dropped, as batch norm wants.

    Fewer rows than `size` make one batch of all.
    """
    order = torch.randperm(count, generator=generator)
    size = min(size, count)
    return list(torch.split(order[: count // size * size], size))


def batches_of_similar_length(lengths: Tensor, size: int, generator: torch.Generator) -> list[Tensor]:
    """Return batches as `batches` does, with rows of similar `lengths` [N] together, in random order."""
    order = torch.cat(batches(len(lengths), size, generator))
    size = min(size, len(lengths))
    pools = [pool[lengths[pool].argsort(stable=True)] for pool in torch.split(order, size * _POOL)]
    grouped = [batch for pool in pools for batch in torch.split(pool, size)]
    return [grouped[at] for at in torch.randperm(len(grouped), generator=generator)]
