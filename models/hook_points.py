"""Where hooks can sit: the modules that a pattern selects, the tensors in what they return, hooks already there."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from layercast.models.layer_names import Pattern, nearest

_HOOK_TABLES = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

_fused_lock = threading.Lock()
_fused_state = {"users": 0, "enabled": True}


class LayerError(ValueError):
    """A layer was asked for that does not exist, did not run, or has no tensor to give."""


def flatten_output(output: Any, part: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield (part, tensor) for every tensor in what a module returned: "" for a tensor, "[0]", "[key][1]" inside."""
    if isinstance(output, Tensor):
        yield part, output
    elif isinstance(output, Mapping):
        for key, value in output.items():
            yield from flatten_output(value, f"{part}[{key}]")
    elif isinstance(output, list | tuple):
        for index, value in enumerate(output):
            yield from flatten_output(value, f"{part}[{index}]")


def select_modules(model: nn.Module, patterns: Sequence[Pattern]) -> dict[str, nn.Module]:
    """Return the modules inside `model` that any of `patterns` may select; LayerError for a pattern without any."""
    if isinstance(model, torch.jit.ScriptModule):
        raise LayerError("hooks need the Python module; a TorchScript program runs without them")
    modules = {path: module for path, module in model.named_modules() if path}
    kinds = module_kinds(modules)
    for pattern in patterns:
        if not any(pattern.may_select(path, kind) for path, kind in kinds.items()):
            raise LayerError(f"no layer matches {pattern.text!r}{_hint(model, pattern.text, modules)}")
    return {
        path: module
        for path, module in modules.items()
        if any(pattern.may_select(path, kinds[path]) for pattern in patterns)
    }


def module_kinds(modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Return the class name of every module by path, as `type:` patterns see it."""
    return {path: type(module).__name__ for path, module in modules.items()}


def registered_hooks(model: nn.Module) -> list[str]:
    """Return the paths of the modules inside `model` ("" is itself) that hold a forward or backward hook."""
    return [path for path, module in model.named_modules() if any(getattr(module, table) for table in _HOOK_TABLES)]


def hook_count(model: nn.Module) -> int:
    """Return how many forward and backward hooks there are on the modules inside `model` and on itself."""
    return sum(len(getattr(module, table)) for module in model.modules() for table in _HOOK_TABLES)


@contextmanager
def fused_attention_off() -> Iterator[None]:
    """Switch torch's fused transformer path off: it computes without calling the modules inside, so no hook fires.

    The switch is one for the whole process; nested and concurrent uses are counted, and the last one restores it.
    """
    with _fused_lock:
        if not _fused_state["users"]:
            _fused_state["enabled"] = torch.backends.mha.get_fastpath_enabled()
            torch.backends.mha.set_fastpath_enabled(False)
        _fused_state["users"] += 1
    try:
        yield
    finally:
        with _fused_lock:
            _fused_state["users"] -= 1
            if not _fused_state["users"]:
                torch.backends.mha.set_fastpath_enabled(bool(_fused_state["enabled"]))


def _hint(model: nn.Module, wanted: str, modules: Mapping[str, nn.Module]) -> str:
    for path, module in model.named_modules(remove_duplicate=False):
        if path == wanted:
            first = next(known for known, other in modules.items() if other is module)
            return f": it is the same module as {first!r}; ask for that name"
    return nearest(wanted, module_kinds(modules))
