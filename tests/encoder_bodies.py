"""Bodies of encoders with weights of their own, and what they compute, in float64."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from layercast.server.engines.encoder.body import Body
from layercast.server.engines.encoder.library import Library
from layercast.server.engines.encoder.plan import Memory, Plan
from layercast.server.engines.encoder.steps import AnyStep, Attention, Linear, Norm
from layercast.server.engines.native.kernel import Crew

LOWEST = float(np.finfo("f4").min)
"""What the exporter adds to the scores of hidden tokens."""
HELD = 5
"""Tokens at the end of a row that `values_for` hides."""


def _weights(*shape: int, scale: float = 1.0) -> np.ndarray:
    rng = np.random.default_rng(sum(shape) * 31 + len(shape))
    return (rng.standard_normal(shape) * scale).astype("f4")


def linear(source: str, target: str, into: int, out: int, bias: bool = True, **also: Any) -> Linear:
    weights = _weights(into, out, scale=into**-0.5)
    return Linear(source, target, weights, _weights(out, scale=0.3) if bias else None, **also)


def norm(source: str, target: str, width: int) -> Norm:
    return Norm(source, target, 1 + _weights(width, scale=0.1), _weights(width, 1, scale=0.1)[:, 0], 1e-5)


def attention(source: str, target: str, into: int, heads: int, head: int, **also: Any) -> Attention:
    """Return attention that is neither even nor all at one token."""
    out = heads * head
    weights = _weights(into, 3 * out, scale=into**-0.5)
    return Attention(source, target, weights, _weights(3 * out, scale=0.2), heads, 1.5 * head**-0.5, **also)


def post_norm(lanes: int, heads: int = 2, vectors: int = 1, into: int = 0, **also: Any) -> Body:
    """Return a block that normalises last; with `into`, it begins with attention alone on tokens of that width."""
    width, wide = heads * vectors * lanes, 7 * lanes
    steps: list[AnyStep] = [
        attention("x", "attended", into or width, heads, vectors * lanes, **also),
        linear("attended", "out", width, width, addend="" if into else "x"),
        norm("out", "first", width),
        linear("first", "wide", width, wide, activation="relu"),
        linear("wide", "narrow", wide, width, bias=False, addend="first"),
        norm("narrow", "y", width),
    ]
    return Body("x", "y", tuple(steps))


def pre_norm(lanes: int, heads: int = 2, vectors: int = 1, **also: Any) -> Body:
    """Return two blocks that normalise first, and what follows them."""
    width, wide = heads * vectors * lanes, 3 * lanes
    steps: list[AnyStep] = []
    for at, (before, after) in enumerate((("x", "a"), ("a", "b"))):
        steps += [
            norm(before, f"norm{at}", width),
            attention(f"norm{at}", f"attended{at}", width, heads, vectors * lanes, **also),
            linear(f"attended{at}", f"sum{at}", width, width, addend=before),
            norm(f"sum{at}", f"middle{at}", width),
            linear(f"middle{at}", f"wide{at}", width, wide, activation="gelu"),
            linear(f"wide{at}", after, wide, width, addend=f"sum{at}"),
        ]
    return Body("x", "y", (*steps, norm("b", "last", width), linear("last", "y", width, lanes)))


def values_for(body: Body, rows: int, length: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Return what `body` reads. Rows of a mask hide some last tokens, or all; factors are 0 for those."""
    rng = np.random.default_rng((seed, rows, length))
    width = body.steps[0].weights.shape[0]
    values = {body.start: rng.standard_normal((rows, length, width)).astype("f4")}
    shown = length - rng.integers(0, HELD + 1, rows)
    shown[2::5] = 0  # a row of padding alone
    mask = (np.arange(length) < shown[:, None]).astype("i4")
    values |= dict.fromkeys(body.masks, mask)
    factors = (mask.max(1) * rng.uniform(0.5, 2, rows)).astype("f4")
    return values | dict.fromkeys(body.factors, factors[:, None, None])


def run(
    library: Library, body: Body, values: dict[str, np.ndarray], crew: int = 1, memory: Memory | None = None
) -> np.ndarray:
    """Return what the kernel computes; a crew of `crew` threads is made for it, and is gone again."""
    plan = Plan(library, body, values[body.start].shape[2])
    return plan.run(values, Crew(library.kernel, crew), memory or Memory())


def wanted(body: Body, values: dict[str, np.ndarray]) -> np.ndarray:
    """Return the same by torch."""
    found = {name: torch.from_numpy(array).double() for name, array in values.items()}
    for step in body.steps:
        found[step.target] = _of_step(step, found)
    return found[body.end].numpy()


def _of_step(step: AnyStep, found: dict[str, Tensor]) -> Tensor:
    source, weights = found[step.source], torch.from_numpy(step.weights).double()
    bias = 0.0 if step.bias is None else torch.from_numpy(step.bias).double()
    if isinstance(step, Norm):
        return functional.layer_norm(source, weights.shape, weights, bias, step.epsilon)
    value = source @ weights + bias
    if isinstance(step, Linear):
        value = {"": value, "relu": value.relu(), "gelu": functional.gelu(value)}[step.activation]
        return value + found[step.addend] if step.addend else value
    q, k, v = (part.unflatten(2, (step.heads, step.head)).transpose(1, 2) for part in value.chunk(3, dim=2))
    scores = q @ k.mT * step.scale
    if step.mask:
        scores = scores + (found[step.mask] <= 0)[:, None, None] * step.hidden
    attended = (scores.softmax(3) @ v).transpose(1, 2).flatten(2)
    return attended * found[step.factor] if step.factor else attended


def check(got: np.ndarray, want: np.ndarray, error: float = 2e-5) -> None:
    assert got.shape == want.shape
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, rtol=0, atol=error * np.abs(want).max(initial=1.0))
