"""Edits: what `steer` changes in the layers of a model."""

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self, SupportsIndex, TypedDict, Unpack

import numpy as np
from numpy.typing import ArrayLike

from layercast.client.errors import InvalidArgument
from layercast.proto.messages import Edit as EditMessage

Indices = SupportsIndex | Iterable[SupportsIndex]


class Where(TypedDict, total=False):
    """What an edit changes, counted from 0; whatever is left out stands for everything.

    `units` are of the last dimension of [N, F] and [N, T, D], `channels` of dimension 1 of [N, C, …], `heads` of a
    MultiHeadAttention; an edit takes one of the three. `positions` are tokens that are not padding, or places in space.
    """

    units: Indices
    channels: Indices
    heads: Indices
    positions: Indices


@dataclass(frozen=True)
class Edit:
    """A change of what one layer returns, made by one of the class's methods and given to `Client.steer`.

    Edit.zero("layer1.0", channels=3)
    Edit.add("blocks.1", direction, positions=[0, 1])

    `layer` is the name of one layer, as `Client.layers` lists it. The server checks it all.
    """

    message: EditMessage

    @classmethod
    def zero(cls, layer: str, **where: Unpack[Where]) -> Self:
        """Put zeros there."""
        message = _selecting(layer, where)
        message.zero.SetInParent()
        return cls(message)

    @classmethod
    def scale(cls, layer: str, factor: float, **where: Unpack[Where]) -> Self:
        """Multiply by `factor`."""
        message = _selecting(layer, where)
        message.scale = factor
        return cls(message)

    @classmethod
    def add(cls, layer: str, vector: ArrayLike, **where: Unpack[Where]) -> Self:
        """Add a vector: one number for each unit or channel that is changed, for heads each head's units in turn."""
        values = np.asarray(vector, np.float64)
        if values.ndim != 1:
            raise InvalidArgument(f"edit of {layer!r}: want a vector of one dimension, got shape {list(values.shape)}")
        message = _selecting(layer, where)
        message.add.SetInParent()
        message.add.values.extend(values.tolist())
        return cls(message)

    @classmethod
    def clamp(cls, layer: str, low: float | None = None, high: float | None = None, **where: Unpack[Where]) -> Self:
        """Bring values below `low` up to it and those above `high` down; None for no bound."""
        message = _selecting(layer, where)
        message.clamp.CopyFrom(EditMessage.Bounds(low=low, high=high))
        return cls(message)

    @classmethod
    def mean(cls, layer: str, **where: Unpack[Where]) -> Self:
        """Put the mean over the rows of the request, and over all positions but padding, there."""
        message = _selecting(layer, where)
        message.mean.SetInParent()
        return cls(message)


def _selecting(layer: str, where: Where) -> EditMessage:
    return EditMessage(
        layer=layer,
        units=_indices(where.get("units", ())),
        channels=_indices(where.get("channels", ())),
        heads=_indices(where.get("heads", ())),
        positions=_indices(where.get("positions", ())),
    )


def _indices(given: Indices) -> list[int]:
    return [operator.index(index) for index in (given if isinstance(given, Iterable) else [given])]
