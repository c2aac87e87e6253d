"""The steps that one call of the library computes, with their weights; values are named as in the program."""

from dataclasses import dataclass
from typing import Literal

from layercast.server.engines.native.memory import Floats


@dataclass(frozen=True, eq=False)
class Linear:
    """`source` · `weights` [in, out] + `bias` [out], the `activation` of that, + `addend` unless that is ""."""

    source: str
    target: str
    weights: Floats
    bias: Floats | None = None
    activation: Literal["", "relu", "gelu"] = ""
    addend: str = ""

    @property
    def reads(self) -> tuple[str, ...]:
        """See `Step`."""
        return (self.source, self.addend) if self.addend else (self.source,)

    @property
    def width(self) -> int:
        """Numbers a token that it gives."""
        return int(self.weights.shape[1])


@dataclass(frozen=True, eq=False)
class Norm:
    """Layer normalisation over the numbers of each token."""

    source: str
    target: str
    weights: Floats
    bias: Floats
    epsilon: float

    @property
    def reads(self) -> tuple[str, ...]:
        """See `Step`."""
        return (self.source,)

    @property
    def width(self) -> int:
        """Numbers a token that it gives."""
        return int(self.weights.shape[0])


@dataclass(frozen=True, eq=False)
class Attention:
    """Self-attention, with the projections of queries, keys and values side by side in `weights` [in, 3 · out].

    `hidden` is added to the scores of tokens that the value `mask`, unless "", has zeros for. Results are multiplied by
    the value `factor`, unless that is "", which has one number a row.
    """

    source: str
    target: str
    weights: Floats
    bias: Floats
    heads: int
    scale: float
    mask: str = ""
    hidden: float = 0.0
    factor: str = ""

    @property
    def reads(self) -> tuple[str, ...]:
        """See `Step`."""
        return (self.source,)

    @property
    def width(self) -> int:
        """Numbers a token that it gives."""
        return int(self.weights.shape[1]) // 3

    @property
    def head(self) -> int:
        """Numbers a token of each head."""
        return self.width // self.heads


AnyStep = Linear | Norm | Attention
