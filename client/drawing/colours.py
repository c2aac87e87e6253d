"""Numbers to colours. Each map is a few anchors with straight lines between them."""

import numpy as np
from numpy.typing import NDArray

from layercast.proto.codec import AnyArray

Colours = NDArray[np.uint8]

# Close to matplotlib's maps viridis, inferno and RdBu (reversed), at equal distances.
VIRIDIS = ((68, 1, 84), (71, 44, 122), (59, 81, 139), (44, 113, 142), (33, 144, 141), (39, 173, 129), (92, 200, 99),
           (170, 220, 50), (253, 231, 37))  # fmt: skip
HEAT = ((0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164))
DIVERGING = ((33, 102, 172), (103, 169, 207), (209, 229, 240), (247, 247, 247), (253, 219, 199), (239, 138, 98),
             (178, 24, 43))  # fmt: skip
RED = DIVERGING[3:]
NOT_A_NUMBER = (128, 128, 128)

Anchors = tuple[tuple[int, int, int], ...]


def coloured(shares: AnyArray, anchors: Anchors) -> Colours:
    """Colours, [..., 3], of numbers from 0 to 1; what is no finite number is grey."""
    values = np.asarray(shares, np.float64)
    finite = np.isfinite(values)
    places = np.where(finite, values, 0).clip(0, 1) * (len(anchors) - 1)
    steps = np.arange(len(anchors))
    channels = [np.interp(places, steps, [anchor[channel] for anchor in anchors]) for channel in range(3)]
    colours = np.stack(channels, axis=-1).round().astype(np.uint8)
    colours[~finite] = NOT_A_NUMBER
    return colours


class Scale:
    """From a set of values to colours: diverging about zero when some are negative, else from lowest to highest.

    With `stretched` always from lowest to highest.
    """

    def __init__(self, values: AnyArray, sequential: Anchors = VIRIDIS, *, stretched: bool = False) -> None:
        numbers = np.asarray(values, np.float64)
        finite = numbers[np.isfinite(numbers)]
        low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
        self.signed = low < 0 and not stretched
        self.anchors = DIVERGING if self.signed else sequential
        bound = max(-low, high)
        self.low, self.high = (-bound, bound) if self.signed else (low, high)

    def shares(self, values: AnyArray) -> NDArray[np.float64]:
        """Where each value lies between the lowest (0) and the highest (1); all equal is 0."""
        width = self.high - self.low
        numbers = np.asarray(values, np.float64)
        return (numbers - self.low) / width if width else np.zeros_like(numbers)

    def colours(self, values: AnyArray) -> Colours:
        """The colours of `values`, [..., 3]."""
        return coloured(self.shares(values), self.anchors)
