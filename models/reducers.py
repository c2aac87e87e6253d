"""Reducers: what is done to a layer's values before they leave the device.

A tap is written `pattern@reducer`, several in turn as `pattern@mean@norm`. The token mask is boolean [N, T], True for
a token that counts and False for padding.
"""

import math
from collections.abc import Callable, Sequence
from typing import Final

import torch
from torch import Tensor

from layercast.models.projection import Projection

REDUCERS: Final = ("none", "mean", "max", "flatten", "cls", "last", "heads", "norm", "fp16", "projD")
"""Names of the reducers; `l2norm` is another name of `norm`, `projD` stands for `proj64` or `proj64:SEED`."""

POOLING: Final = ("mean", "max", "cls", "last")
"""Reducers that leave one vector a row of a map over places or tokens."""

_ALIASES: Final = {"l2norm": "norm"}
_OF_TOKENS: Final = ("cls", "last")


class ReducerError(ValueError):
    """The reducer is unknown, or the layer's shape does not fit it."""


def split_tap(tap: str) -> tuple[str, str]:
    """Split `pattern[@reducer[@reducer…]]` into pattern and reducers ("none" where there are none), checked."""
    pattern, _, reducers = tap.partition("@")
    reducers = reducers or "none"
    check_reducers(reducers)
    return pattern, reducers


def check_reducers(reducers: str) -> None:
    """Raise ReducerError unless every name in the `@`-joined `reducers` is known."""
    for name in reducers.split("@"):
        if _ALIASES.get(name, name) not in _STEPS and _projection(name) is None:
            raise ReducerError(f"unknown reducer {name!r}; known: {', '.join(REDUCERS)} (as proj64 or proj64:SEED)")


def gives_floats(reducer: str) -> bool:
    """Return whether one `reducer` gives float32 for whole numbers."""
    return _ALIASES.get(reducer, reducer) in ("mean", "heads", "norm") or _projection(reducer) is not None


def reduce(value: Tensor, reducers: str, token_mask: Tensor | None = None) -> Tensor:
    """Apply the `@`-joined `reducers` to `value` [N, …]; the first one sees the token mask if it is given.

    * `mean`, `max`: over space for [N, C, …], over the tokens that count for [N, T, D], nothing for [N, F]
    * `cls`, `last`: the first, the last token that counts of [N, T, D]
    * `heads`: the mean over the heads of attention maps, [N, H, T, S] to [N, T, S]
    * `flatten`: [N, everything else];  `norm`: each row scaled to Euclidean length 1;  `fp16`: cast to half
    * `projD`, `projD:SEED`: [N, D], a random projection of everything else, as in `projection.Projection`; tokens that
      don't count are zeros to it
    A row without any token that counts gives zeros. The result may be a view of `value`.
    """
    for name in reducers.split("@"):
        projection = _projection(name)
        if projection is not None:
            value = _project(projection, value, token_mask)
        else:
            value = _STEPS[_ALIASES.get(name, name)](value, token_mask)
    return value


def reduced_shape(shape: Sequence[int], reducers: str) -> tuple[int, ...]:
    """Return the shape that `reduce` gives for `shape`, whose dimensions must be known; ReducerError as there."""
    result = tuple(shape)
    for name in (_ALIASES.get(name, name) for name in reducers.split("@")):
        if name in _OF_TOKENS:
            _want_tokens(name, result)
        if name == "heads":
            _want_maps(result)
            result = (result[0], *result[2:])
        elif name in ("mean", "max") and len(result) > 3:
            result = result[:2]
        elif name in ("mean", "max", *_OF_TOKENS) and len(result) == 3:
            result = (result[0], result[2])
        elif name == "flatten":
            result = (result[0], _width(result))
        elif (projection := _projection(name)) is not None:
            _want_narrow(projection, result)
            result = (result[0], projection.size)
    return result


def pools(shape: Sequence[int], reducers: str) -> bool:
    """Return whether values of `shape`, -1 for a size that depends on the input, are [N, D] with a fixed D after them.

    Something of a map over places or tokens that is only laid out in another way (`flatten`), or projected, is not.
    """
    for name in reducers.split("@"):
        if len(shape) > 2 and (name == "flatten" or _projection(name) is not None):
            return False
        if name in POOLING:
            shape = reduced_shape(shape, name)
    return len(shape) == 1 or (len(shape) == 2 and shape[1] != -1)


def _projection(name: str) -> Projection | None:
    return Projection.parse(name) if name.startswith("proj") else None


def _project(projection: Projection, value: Tensor, mask: Tensor | None) -> Tensor:
    _want_narrow(projection, tuple(value.shape))
    if value.dim() == 3 and mask is not None:
        value = torch.where(_keep(value, mask), value, 0)
    projected = projection(_flatten(value, None))
    return projected.to(value.dtype) if value.is_floating_point() else projected


def _width(shape: tuple[int, ...]) -> int:
    return math.prod(shape[1:])


def _want_narrow(projection: Projection, shape: tuple[int, ...]) -> None:
    if _width(shape) > projection.widest:
        raise ReducerError(
            f"reducer {projection.text} takes at most {projection.widest:,} values a row, a layer of shape "
            f"{list(shape)} has {_width(shape):,}; reduce it first, for instance @mean@{projection.text}"
        )


def _mean(value: Tensor, mask: Tensor | None) -> Tensor:
    if not value.is_floating_point():
        value = value.float()
    if value.dim() != 3:
        return value.flatten(2).mean(dim=2) if value.dim() > 3 else value
    keep = _keep(value, mask)
    total = torch.where(keep, value, 0).sum(dim=1)
    return total / keep.sum(dim=1).clamp(min=1).to(value.dtype)


def _max(value: Tensor, mask: Tensor | None) -> Tensor:
    if value.dim() != 3:
        return value.flatten(2).amax(dim=2) if value.dim() > 3 else value
    if value.shape[1] == 0:
        return value.new_zeros(value.shape[0], value.shape[2])
    keep = _keep(value, mask)
    if value.dtype == torch.bool:
        return (value & keep).any(dim=1)
    least = torch.finfo(value.dtype).min if value.is_floating_point() else torch.iinfo(value.dtype).min
    return torch.where(keep.any(dim=1), torch.where(keep, value, least).amax(dim=1), 0)


def _cls(value: Tensor, mask: Tensor | None) -> Tensor:
    return _pick(value, mask, "cls")


def _last(value: Tensor, mask: Tensor | None) -> Tensor:
    return _pick(value, mask, "last")


def _pick(value: Tensor, mask: Tensor | None, name: str) -> Tensor:
    _want_tokens(name, tuple(value.shape))
    if value.shape[1] == 0:
        return value.new_zeros(value.shape[0], value.shape[2])
    if mask is None:
        return value[:, 0] if name == "cls" else value[:, -1]
    keep = _keep(value, mask)[:, :, 0]
    place = torch.arange(value.shape[1], device=value.device)
    ranked = torch.where(keep, place if name == "last" else -place, -value.shape[1])
    chosen = value[torch.arange(value.shape[0], device=value.device), ranked.argmax(dim=1)]
    return torch.where(keep.any(dim=1, keepdim=True), chosen, 0)


def _heads(value: Tensor, mask: Tensor | None) -> Tensor:
    _want_maps(tuple(value.shape))
    return (value if value.is_floating_point() else value.float()).mean(dim=1)


def _flatten(value: Tensor, mask: Tensor | None) -> Tensor:
    return value.flatten(1) if value.dim() > 1 else value.unsqueeze(1)


def _norm(value: Tensor, mask: Tensor | None) -> Tensor:
    if not value.is_floating_point():
        value = value.float()
    # In float32: the squares of halves overflow above 256.
    rows = value.flatten(1) if value.dim() > 1 else value.unsqueeze(1)
    length: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=torch.promote_types(value.dtype, torch.float32))
    scale = length.clamp(min=torch.finfo(length.dtype).tiny).reciprocal().view(-1, *[1] * (value.dim() - 1))
    return (value * scale).to(value.dtype)


def _keep(value: Tensor, mask: Tensor | None) -> Tensor:
    """Return the token mask as [N, T, 1], all True where there is none."""
    if mask is None:
        return torch.ones(*value.shape[:2], 1, dtype=torch.bool, device=value.device)
    if mask.dtype != torch.bool or mask.shape != value.shape[:2]:
        raise ReducerError(
            f"the token mask must be boolean {list(value.shape[:2])} to fit a layer of shape {list(value.shape)}, "
            f"got {mask.dtype} {list(mask.shape)}; ask for this layer without a reducer over tokens"
        )
    return mask.to(value.device).unsqueeze(2)


def _want_tokens(name: str, shape: tuple[int, ...]) -> None:
    if len(shape) != 3:
        raise ReducerError(f"reducer {name} wants a layer of shape [N, T, D], got {list(shape)}")


def _want_maps(shape: tuple[int, ...]) -> None:
    if len(shape) != 4:
        raise ReducerError(f"reducer heads wants attention maps, a layer of shape [N, H, T, S], got {list(shape)}")


_STEPS: Final[dict[str, Callable[[Tensor, Tensor | None], Tensor]]] = {
    "none": lambda value, mask: value,
    "mean": _mean,
    "max": _max,
    "flatten": _flatten,
    "cls": _cls,
    "last": _last,
    "heads": _heads,
    "norm": _norm,
    "fp16": lambda value, mask: value.half(),
}
