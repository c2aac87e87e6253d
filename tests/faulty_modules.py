"""Modules that no program can carry over, each inside a `Holder`; in a file of their own, for exports to import."""

import numpy as np
import torch
from torch import nn

CALLS: list[None] = []


@torch.library.custom_op("layercast_tests::double", mutates_args=())
def double(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@double.register_fake
def _(x):
    return torch.empty_like(x)


class CustomOperator(nn.Module):
    def forward(self, x):
        return double(x)


class Untranslatable(nn.Module):
    def forward(self, x):
        return torch.special.bessel_j0(x)


class RareBranch(nn.Module):
    """No example reaches the other branch, and rows do not depend on each other."""

    def forward(self, x):
        return x * 2 if x.abs().max() < 1e6 else x - 1


class ItemBranch(nn.Module):
    def forward(self, x):
        return x * 2 if x.abs().max().item() < 1e6 else x - 1


class MeanBranch(nn.Module):
    def forward(self, x):
        return x * 2 if x.mean() > 0 else x - 1


class FrozenBatch(nn.Module):
    def forward(self, x):
        return x + torch.zeros(int(x.shape[0]), 1)


class ThroughNumpy(nn.Module):
    def forward(self, x):
        return torch.from_numpy(x.detach().numpy() * np.float32(2))


class RowsByList(nn.Module):
    def forward(self, x):
        return torch.stack([row * 2 for row in x.tolist() and x])


class Random(nn.Module):
    def forward(self, x):
        return nn.functional.dropout(x, 0.5, training=True)


class WithState(nn.Module):
    def forward(self, x):
        CALLS.append(None)
        return x + len(CALLS)


class NeedsMoreRows(nn.Module):
    def forward(self, x):
        return nn.functional.batch_norm(x, None, None, training=True)


class Holder(nn.Module):
    """A fault inside other modules, so that it has a path."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(10, 10), globals()[fault]())

    def forward(self, x):
        return self.net(x)
