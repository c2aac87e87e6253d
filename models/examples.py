"""Example inputs for a model, made from what its card says about them."""

from collections.abc import Sequence
from typing import Final, Literal, Self

import torch
from torch import Tensor

from layercast.models.card import Card
from layercast.models.datatypes import TORCH_DTYPES
from layercast.models.manifest import TensorSpec

Kind = Literal["random", "zeros", "low", "high"]
KINDS: Final[tuple[Kind, ...]] = ("random", "zeros", "low", "high")
"""Random within the range (with padded tails for tokens), all zero, all at the lower end, all at the upper end."""

Range = tuple[float, float]

_DEFAULT_LENGTH: Final = 10


class Examples:
    """Makes inputs that fit `specs`, the same ones for the same `seed` and arguments.

    Inputs without a range get floats within `default_range` and integers 0 and 1. A mask always keeps a row's
    first token: what attention over nothing gives is nobody's contract. Dynamic dimensions get `length`, further ones
    of the same input one more each, so that an exporter does not take two of them for one.
    """

    def __init__(self, specs: Sequence[TensorSpec], seed: int = 0, default_range: Range = (-1.0, 1.0)) -> None:
        self.specs = tuple(specs)
        self._seed = seed
        self._default_range = default_range
        self.is_dynamic = any(spec.dynamic_dimensions() for spec in self.specs)

    @classmethod
    def of(cls, card: Card, seed: int = 0) -> Self:
        """Return examples for the inputs of `card`, within what its preprocessing gives."""
        scale = (card.preprocessing or {}).get("scale")
        pixels = (0.0, 255 * scale) if isinstance(scale, int | float) else (-1.0, 1.0)
        return cls(card.inputs, seed, pixels)

    def lengths(self) -> tuple[int, ...]:
        """Return sizes worth trying in the dynamic dimensions, the default first, the longest (if it is known) last."""
        if not self.is_dynamic:
            return (0,)
        longest = min((spec.max_length for spec in self.specs if spec.max_length), default=None)
        wanted = (_DEFAULT_LENGTH, 4, 1, 17, longest or 33)
        return tuple(dict.fromkeys(min(length, longest or length) for length in wanted))

    def make(self, batch: int, length: int = _DEFAULT_LENGTH, kind: Kind = "random") -> dict[str, Tensor]:
        """Return one tensor per input with `batch` rows, named as in the specs."""
        generator = torch.Generator().manual_seed(self._seed + 1000 * batch + length)
        return {spec.name: self._tensor(spec, batch, length, kind, generator) for spec in self.specs}

    def _tensor(self, spec: TensorSpec, batch: int, length: int, kind: Kind, generator: torch.Generator) -> Tensor:
        if spec.datatype not in TORCH_DTYPES:
            raise ValueError(f"input {spec.name}: a model cannot take {spec.datatype}")
        dtype = TORCH_DTYPES[spec.datatype]
        shape = _shape(spec, batch, length)
        low, high = spec.range or (self._default_range if dtype.is_floating_point else (0.0, 1.0))
        if kind != "random":
            constant = 1.0 if spec.is_mask else {"zeros": min(max(0.0, low), high), "low": low, "high": high}[kind]
            return torch.full(shape, constant).to(dtype)
        if dtype.is_floating_point:
            return (low + (high - low) * torch.rand(shape, generator=generator)).to(dtype)
        values = torch.randint(int(low), int(high) + 1, shape, generator=generator).to(dtype)
        if spec.is_mask:
            values[:, 0] = 1
        return values if spec.pad is None else _padded(values, spec.pad, generator)


def _padded(values: Tensor, pad: int, generator: torch.Generator) -> Tensor:
    """Pad the tails of all rows but the first, each from a random place on (the first token always stays)."""
    size = values.shape[1] if values.dim() > 1 else 1
    ends = torch.randint(1, size + 1, (values.shape[0],), generator=generator)
    ends[0] = size
    tail = torch.arange(size) >= ends[:, None]
    return torch.where(tail.view(*tail.shape, *[1] * (values.dim() - 2)), torch.tensor(pad, dtype=values.dtype), values)


def _shape(spec: TensorSpec, batch: int, length: int) -> list[int]:
    sizes = [batch, *spec.shape[1:]]
    for further, index in enumerate(spec.dynamic_dimensions()):
        sizes[index] = min(length + further, spec.max_length or length + further)
    return sizes
