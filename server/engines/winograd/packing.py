"""Weights as the library reads them."""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from layercast.server.engines.native.memory import Floats, kept

TILE: Final = 4
"""Side of the tiles of results; as in winograd.cpp, like the points."""
_NEAR: Final = 11 / 16
_FAR: Final = 3 / 2


def _filter_matrix() -> NDArray[np.float64]:
    """Return G of [6, 3], at the points 0, ±NEAR, ±FAR and infinity, for the matrices in winograd.cpp."""
    points = [0.0, _NEAR, -_NEAR, _FAR, -_FAR]
    scales = [np.prod([point - other for other in points if other != point]) for point in points]
    return np.array([*([1 / s, p / s, p * p / s] for p, s in zip(points, scales, strict=True)), [0, 0, 1]])


_G: Final = _filter_matrix()


def transformed(weights: Floats, panel: int) -> Floats:
    """Return weights [out, in, 3, 3] as [position, panel, in, out of the panel], transformed in float64."""
    out, into = weights.shape[:2]
    by_position = np.einsum("ai,ocij,bj->abco", _G, weights.astype(np.float64), _G, optimize=True)
    return _in_panels(by_position.reshape(-1, into, out), panel)


def direct(weights: Floats, panel: int) -> Floats:
    """Return weights [out, in, kernel, kernel] as [1, panel, kernel · kernel · in, out of the panel]."""
    return _in_panels(weights.transpose(2, 3, 1, 0).reshape(1, -1, len(weights)), panel)


def _in_panels(weights: NDArray[np.floating], panel: int) -> Floats:
    positions, depth, _ = weights.shape
    return kept(weights.reshape(positions, depth, -1, panel).transpose(0, 2, 1, 3))
