"""Layers without, with and with only buffers as state: CenteredLayer, Linear, RunningNorm."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from layercast.models.layers.checks import number, positive, recording


class CenteredLayer(nn.Module):
    """Subtracts the mean over the last dimension from every row: [..., D] -> [..., D]. No parameters.

    The mean is taken per row, never over the batch, so that what shares a batch cannot change an answer.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` with zero mean along its last dimension."""
        return x - x.mean(dim=-1, keepdim=True)


class Linear(nn.Module):
    """y = x W^T + b with its own parameters: [..., in_features] -> [..., out_features].

    Initialised as torch's own Linear is: uniform in ±1/sqrt(in_features).
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        positive("Linear", in_features=in_features, out_features=out_features)
        self.in_features = in_features
        self.out_features = out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weight and bias anew."""
        bound = 1 / math.sqrt(self.in_features)
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` W^T + b."""
        return functional.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        """Describe the layer as `print(module)` shows it."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class RunningNorm(nn.Module):
    """Normalises each feature by batch statistics in training and by running ones in eval: [N, F] -> [N, F].

    Like BatchNorm1d(affine=False) (Ioffe and Szegedy 2015), except that the running variance takes the biased
    estimate, as the normalisation itself does. The statistics are buffers: saved, moved, never trained.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_features: int, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        positive("RunningNorm", num_features=num_features)
        if not number(momentum) or not 0.0 < momentum <= 1.0:
            raise ValueError(f"RunningNorm: momentum must be above 0 and at most 1, got {momentum!r}")
        if not number(eps) or not eps > 0.0:  # so written that NaN is refused
            raise ValueError(f"RunningNorm: eps must be above 0, got {eps!r}")
        self.num_features = num_features
        self.momentum = momentum
        self.eps = eps
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` normalised per feature; in training mode also move the running statistics."""
        if not recording() and (x.dim() != 2 or x.shape[1] != self.num_features):
            raise ValueError(f"RunningNorm: want [N, {self.num_features}], got {list(x.shape)}")
        if not self.training:
            return (x - self.running_mean) * torch.rsqrt(self.running_var + self.eps)
        if len(x) < 2:
            raise ValueError(f"RunningNorm: training needs at least 2 rows a batch, got {len(x)}; drop the last batch")
        mean = x.mean(dim=0)
        variance = x.var(dim=0, unbiased=False)
        with torch.no_grad():
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_(variance.to(self.running_var.dtype), self.momentum)
        return (x - mean) * torch.rsqrt(variance + self.eps)

    def extra_repr(self) -> str:
        """Describe the layer as `print(module)` shows it."""
        return f"{self.num_features}, momentum={self.momentum}, eps={self.eps}"
