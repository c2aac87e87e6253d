"""State dicts against the module that they are for: strict, tied weights kept tied, nothing left out in silence."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Final

from torch import Tensor, nn

_SHOWN: Final = 5


class StateError(ValueError):
    """A state dict is not this module's; the text names the keys or shapes and the nearest ones."""


def shared_names(module: nn.Module) -> list[list[str]]:
    """Return the keys of the module's state dict in groups that name one tensor."""
    groups: dict[object, list[str]] = {}
    for name, value in module.state_dict().items():
        if not isinstance(value, Tensor):
            raise StateError(f"{name}: only tensors can be kept in weights, got {type(value).__name__}")
        place = (value.data_ptr(), value.shape, value.stride(), value.dtype) if value.numel() else name
        groups.setdefault(place, []).append(name)
    return list(groups.values())


def load(module: nn.Module, stored: Mapping[str, Tensor], source: object) -> None:
    """Load all of `stored` into all of `module`; StateError naming `source` when they do not fit exactly.

    A tied weight may stand under one of its names or under all, with equal values. A buffer that the module does not
    save (`persistent=False`) may be there, as files from before it was so have it, if its values are the module's.
    """
    wanted = module.state_dict()
    given = {name: value for name, value in stored.items() if name not in wanted and _is_buffer(module, name, value)}
    unexpected = sorted(stored.keys() - wanted.keys() - given.keys())
    full = {name: value for name, value in stored.items() if name in wanted}
    missing = []
    for names in shared_names(module):
        known = [name for name in names if name in stored]
        if not known:
            missing.append(names[0])
            continue
        _refuse_differing(stored, known, source)
        for name in names:
            full[name] = stored[known[0]]
    if missing or unexpected:
        raise StateError(_misfit(module, missing, unexpected, source))
    for name, tensor in wanted.items():
        if full[name].shape != tensor.shape:
            raise StateError(
                f"{source}: {name}: {type(module).__name__} wants shape {list(tensor.shape)}, "
                f"the file has {list(full[name].shape)}"
            )
        if full[name].is_floating_point() != tensor.is_floating_point():
            raise StateError(f"{source}: {name}: want {tensor.dtype}, the file has {full[name].dtype}")
    module.load_state_dict(full, strict=True)


def fits(module: nn.Module, names: Sequence[str]) -> bool:
    """Tell whether `names` are the keys of the module's state dict, each tied weight under at least one of its."""
    wanted = set(module.state_dict())
    buffers = {name for name, _ in module.named_buffers()}
    present = set(names)
    return present <= wanted | buffers and all(present.intersection(group) for group in shared_names(module))


def _is_buffer(module: nn.Module, name: str, value: Tensor) -> bool:
    """Tell whether the module has a buffer `name`, which it does not save, with these values."""
    buffer = dict(module.named_buffers()).get(name)
    return buffer is not None and buffer.shape == value.shape and bool((buffer.cpu() == value.cpu()).all())


def _refuse_differing(stored: Mapping[str, Tensor], names: Sequence[str], source: object) -> None:
    first = stored[names[0]]
    for name in names[1:]:
        other = stored[name]
        if other.shape != first.shape or not bool((other == first).all()):
            raise StateError(
                f"{source}: {names[0]} and {name} are one tensor in the module, but differ in the file; build the "
                f"module without tying them, or save the weights again"
            )


def _misfit(module: nn.Module, missing: Sequence[str], unexpected: Sequence[str], source: object) -> str:
    text = (
        f"{source}: the weights do not fit {type(module).__name__}: "
        f"missing {_few(missing)}; not expected {_few(unexpected)}"
    )
    near = []
    for name in missing[:_SHOWN]:
        if close := difflib.get_close_matches(name, unexpected, n=1, cutoff=0.6):
            near.append(f"{name} may be {close[0]}")
    return f"{text}; {', '.join(near)}" if near else text


def _few(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN]) or "nothing"
    return f"{shown} and {len(names) - _SHOWN} more" if len(names) > _SHOWN else shown
