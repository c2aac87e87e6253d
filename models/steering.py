"""Steering: a forward in which planned edits change values inside the model, each for its own rows alone.

with torch.inference_mode(), steered(model, [(slice(0, 2), planned)]):
    logits = model(images)   # rows 0 and 1 as if the layer had returned the edited values
"""

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from layercast.models.edits import Add, Clamp, Mean, Planned, Scale, SteeringError, Zero
from layercast.models.hook_points import fused_attention_off

Placed = tuple[slice, Planned]
"""An edit and the rows, a slice of the batch, that it is for."""


@contextmanager
def steered(model: nn.Module, edits: Sequence[Placed], token_mask: Tensor | None = None) -> Iterator[None]:
    """Make `edits` in the one forward of `model` that the body runs; the hooks are gone when it ends, however it does.

    What a layer returns is copied, the copy is edited and stands in its place: later modules, and hooks that were put
    there after, see it; the rows of others keep their values to the last bit. Edits of one layer are made in order.
    `token_mask` is boolean [N, T], True for tokens that count. SteeringError when a layer did not run, or has not the
    shape that was planned.
    """
    by_module: dict[tuple[str, bool], list[Placed]] = defaultdict(list)
    for rows, edit in edits:
        by_module[edit.name.path, edit.before].append((rows, edit))
    sites = [_Site(placed, token_mask) for placed in by_module.values()]
    handles: list[RemovableHandle] = []
    try:
        for (path, before), site in zip(by_module, sites, strict=True):
            module = model.get_submodule(path)
            handles.append(
                module.register_forward_pre_hook(site.before) if before else module.register_forward_hook(site.after)
            )
        with fused_attention_off():
            yield
    finally:
        for handle in handles:
            handle.remove()
    for site in sites:
        site.check_ran()


class _Site:
    """The edits of one module's values, and the calls of it so far."""

    def __init__(self, edits: Sequence[Placed], token_mask: Tensor | None) -> None:
        self._edits = edits
        self._mask = token_mask
        self._calls = 0

    def after(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Forward hook: return what stands in the place of `output`."""
        for part, edits in self._next().items():
            output = _replaced(output, part, partial(self._edited, edits=edits))
        return output

    def before(self, module: nn.Module, args: Any) -> Any:
        """Forward pre-hook: return what stands in the place of the only argument."""
        for edits in self._next().values():
            args = (self._edited(args[0], edits), *args[1:])
        return args

    def check_ran(self) -> None:
        """Raise SteeringError for an edit of a call that never came: it would have changed nothing, in silence."""
        for _, edit in self._edits:
            if edit.name.call >= self._calls:
                raise SteeringError(f"layer {edit.name.text(repeated=edit.name.call > 0)!r} did not run for these rows")

    def _next(self) -> dict[str, list[Placed]]:
        """Return the edits of the call that runs now, by the part of its values that they change."""
        found: dict[str, list[Placed]] = defaultdict(list)
        for rows, edit in self._edits:
            if edit.name.call == self._calls:
                found[edit.name.part].append((rows, edit))
        self._calls += 1
        return found

    def _edited(self, value: Tensor, edits: Sequence[Placed]) -> Tensor:
        changed = value.clone()
        for rows, edit in edits:
            if tuple(value.shape[1:]) != edit.shape[1:]:
                raise SteeringError(
                    f"layer {edit.name.path!r} gave values of shape {list(value.shape[1:])} a row for these inputs, "
                    f"not {list(edit.shape[1:])}; they can't be edited"
                )
            mask = self._mask[rows].to(value.device) if edit.masked and self._mask is not None else None
            changed[rows] = edited(changed[rows], edit, mask)
        return changed


def edited(own: Tensor, edit: Planned, mask: Tensor | None = None) -> Tensor:
    """Return values [n, …] of some rows with `edit` made in them; `mask` is boolean [n, T], None where none counts."""
    new = _new(own, edit, mask)
    return torch.where(_chosen_units(own, edit) & _chosen_positions(own, edit, mask), new, own)


def _new(own: Tensor, edit: Planned, mask: Tensor | None) -> Tensor:
    """Return what the action makes of all values, broadcasting over `own`."""
    match edit.action:
        case Zero():
            return own.new_zeros(())
        case Scale(factor):
            return own * factor
        case Clamp(low, high):
            return own.clamp(low, high)
        case Add(vector):
            whole = own.new_zeros(own.shape[edit.unit_dimension])
            places = slice(None) if edit.units is None else list(edit.units)
            whole[places] = torch.tensor(vector, dtype=own.dtype, device=own.device)
            return own + _along(whole, own, edit.unit_dimension)
        case Mean():
            return _mean(own, edit, mask)


def _mean(own: Tensor, edit: Planned, mask: Tensor | None) -> Tensor:
    """Return each unit's mean over rows and positions, those of padding left out; zeros where nothing counts."""
    dimensions = (0, *edit.position_dimensions)
    # In float32 at least: a sum of halves would overflow.
    values = own.to(torch.promote_types(own.dtype, torch.float32))
    if mask is None:
        return values.mean(dim=dimensions, keepdim=True).to(own.dtype)
    total = torch.where(mask[:, :, None], values, 0).sum(dim=dimensions, keepdim=True)
    return (total / mask.sum().clamp(min=1)).to(own.dtype)


def _chosen_units(own: Tensor, edit: Planned) -> Tensor:
    size = own.shape[edit.unit_dimension]
    return _along(_among(range(size) if edit.units is None else edit.units, size, own.device), own, edit.unit_dimension)


def _chosen_positions(own: Tensor, edit: Planned, mask: Tensor | None) -> Tensor:
    """Return where the edit is made, boolean, broadcasting over `own`."""
    if edit.positions is None:
        return torch.ones((), dtype=torch.bool, device=own.device)
    sizes = [own.shape[at] if at in edit.position_dimensions else 1 for at in range(own.dim())]
    chosen = _among(edit.positions, math.prod(sizes), own.device)
    if mask is None:
        return chosen.view(sizes)
    counted = mask.cumsum(dim=1) - 1  # the number of each token among those that count
    return (chosen[counted.clamp(min=0)] & mask)[:, :, None]


def _among(chosen: Sequence[int], size: int, device: torch.device) -> Tensor:
    marks = torch.zeros(size, dtype=torch.bool, device=device)
    marks[torch.tensor(list(chosen), dtype=torch.long, device=device)] = True
    return marks


def _along(values: Tensor, like: Tensor, dimension: int) -> Tensor:
    """Return a vector as a tensor that broadcasts over `like`, along one of its dimensions."""
    return values.view([-1 if at == dimension else 1 for at in range(like.dim())])


def _replaced(output: Any, part: str, change: Callable[[Tensor], Tensor]) -> Any:
    """Return what a module returned with one part (`[0]`, `[key][1]`, "" for a tensor) changed, nothing in place."""
    if not part:
        return change(output)
    key, _, rest = part.removeprefix("[").partition("]")
    if isinstance(output, Mapping):
        mapping: Any = copy.copy(output)
        name = next(name for name in output if str(name) == key)
        mapping[name] = _replaced(output[name], rest, change)
        return mapping
    items = list(output)
    items[int(key)] = _replaced(items[int(key)], rest, change)
    if hasattr(output, "_fields"):  # a named tuple
        return type(output)(*items)
    return type(output)(items)
