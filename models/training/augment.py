"""Augmentation that suits the data. Every function maps a batch to a batch and draws from a given generator."""

import math

import torch
from torch import Tensor
from torch.nn import functional

PADDING = 256


def digits(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift, turn, scale, shear and elastically bend digits [N, 1, 28, 28] (Simard et al. 2003)."""
    count = len(images)

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(count, generator=generator) * (high - low) + low

    angle, shear = uniform(-0.22, 0.22), uniform(-0.2, 0.2)
    scale_x, scale_y = uniform(0.85, 1.18), uniform(0.85, 1.18)
    cos, sin = torch.cos(angle), torch.sin(angle)
    rows = (
        torch.stack([cos * scale_x, (shear * cos - sin) * scale_y, uniform(-0.14, 0.14)], dim=1),
        torch.stack([sin * scale_x, (shear * sin + cos) * scale_y, uniform(-0.14, 0.14)], dim=1),
    )
    grid = functional.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid + _bend(count, generator), align_corners=False)


def _bend(count: int, generator: torch.Generator, sigma: float = 4.0, strength: float = 0.9) -> Tensor:
    """Return smooth random displacements [N, 28, 28, 2] in grid units (half an image is 1)."""
    noise = torch.rand(count * 2, 1, 28, 28, generator=generator) * 2 - 1
    radius = math.ceil(2 * sigma)
    weights = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma) ** 2)
    weights = weights / weights.sum()
    smooth = functional.conv2d(noise, weights.reshape(1, 1, 1, -1), padding=(0, radius))
    smooth = functional.conv2d(smooth, weights.reshape(1, 1, -1, 1), padding=(radius, 0))
    return strength * smooth.reshape(count, 2, 28, 28).permute(0, 2, 3, 1)


def photos(images: Tensor, generator: torch.Generator, size: int = 32, hole: int = 8) -> Tensor:
    """Mirror, crop to `size` from the image padded by 4, and cut a square hole (DeVries and Taylor 2017)."""
    count, channels, height, width = images.shape
    mirrored = torch.rand(count, 1, 1, 1, generator=generator) < 0.5
    images = torch.where(mirrored, images.flip(-1), images)
    padded = functional.pad(images, (4, 4, 4, 4), mode="reflect")
    top = torch.randint(0, height + 8 - size + 1, (count, 1), generator=generator) + torch.arange(size)
    left = torch.randint(0, width + 8 - size + 1, (count, 1), generator=generator) + torch.arange(size)
    rows = torch.arange(count)[:, None, None, None]
    planes = torch.arange(channels)[None, :, None, None]
    crop = padded[rows, planes, top[:, None, :, None], left[:, None, None, :]]
    y = torch.randint(0, size, (count, 1), generator=generator)
    x = torch.randint(0, size, (count, 1), generator=generator)
    ticks = torch.arange(size)
    outside = ((ticks - y).abs() > hole // 2)[:, None, :, None] | ((ticks - x).abs() > hole // 2)[:, None, None, :]
    return crop * outside


def text(tokens: Tensor, generator: torch.Generator, drop: float = 0.04, swap_case: float = 0.15) -> Tensor:
    """Delete a few bytes, begin some texts later, and change the case of whole texts; tokens int64 [N, T]."""
    count, length = tokens.shape
    swapped = torch.rand(count, 1, generator=generator) < swap_case
    upper = (tokens >= ord("a")) & (tokens <= ord("z")) & swapped
    tokens = torch.where(upper, tokens - 32, tokens)
    used = (tokens != PADDING).sum(dim=1, keepdim=True)
    start = (torch.rand(count, 1, generator=generator) ** 2 * used * 0.4).long()
    start = torch.where(torch.rand(count, 1, generator=generator) < 0.5, start, 0)
    keep = (torch.rand(count, length, generator=generator) >= drop) & (tokens != PADDING)
    keep &= torch.arange(length) >= start
    # A stable sort of the dropped-flags moves kept bytes to the front in their order.
    order = (~keep).to(torch.int8).argsort(dim=1, stable=True)
    return torch.where(keep, tokens, PADDING).gather(1, order)
