"""Weights as other people save them: safetensors, files of torch.save, shards with an index, in all their wrappings."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor, nn

from layercast.models import state_dicts, torch_files

TORCH_SUFFIXES: Final = (".pt", ".pth", ".bin", ".ckpt")

_KEYS: Final = (
    "state_dict", "model_state_dict", "model", "net", "network", "module", "params", "weights",
    "ema", "model_ema", "ema_state_dict", "ema_model", "state_dict_ema", "params_ema", "teacher", "student",
)  # fmt: skip
"""Keys under which a training script's checkpoint keeps the weights."""

_WRAPPERS: Final = ("module.", "_orig_mod.")
"""What nn.DataParallel (and its kin) and torch.compile put before every name."""

_DEPTH: Final = 3


class WeightsError(ValueError):
    """A file holds no weights that can be taken for the module's; the text names the file and what it holds."""


@dataclass(frozen=True)
class _Found:
    """A state dict inside a file: the keys that lead to it ("" for the file itself), and its tensors."""

    where: str
    tensors: Mapping[str, Tensor]


def load_file(module: nn.Module, path: Path, key: str = "") -> list[str]:
    """Load the weights in `path` into `module`, all of them into all of it, and return lines about what was done.

    `key` chooses among several state dicts in one file, as in `ema` or `state_dict.model`. WeightsError, StateError or
    TorchFileError says why the file cannot be used; nothing in it is run.
    """
    source = f"{path} {key}".rstrip()
    found = _choose(module, list(_state_dicts(_read(path), "")), path, key)
    tensors, note = _unwrapped(module, found.tensors)
    lines = [f"weights from {found.where!r} in {path.name}"] if found.where else []
    state_dicts.load(module, tensors, source)
    return [*lines, *([note] if note else [])]


def _read(path: Path) -> Any:
    """Return what the file holds, by its name's ending."""
    if path.name.endswith(".index.json"):
        return _read_shards(path)
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load(path.read_bytes())
        except SafetensorError as error:
            raise WeightsError(f"{path}: not a safetensors file: {error}") from error
    if path.suffix in TORCH_SUFFIXES:
        return torch_files.load(path, "cpu")
    wanted = ", ".join((".safetensors", *TORCH_SUFFIXES, ".index.json"))
    why = "a pickle can run any code when it is read" if path.suffix in (".pkl", ".pickle") else "unknown kind of file"
    raise WeightsError(
        f"{path}: {why}; want {wanted}: write safetensors, or the state dict alone with torch.save(model.state_dict(), "
        f"FILE)"
    )


def _read_shards(index: Path) -> dict[str, Tensor]:
    """Return the tensors of all files that an index (Hugging Face's form) names; every one must be where it says."""
    try:
        places = json.loads(index.read_bytes())["weight_map"]
        files = sorted(set(places.values()))
        if not all(Path(name).name == name and not name.endswith(".json") for name in files):
            raise ValueError("weight_map must hold names of files beside it")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{index}: not an index of weights: {error}") from error
    tensors: dict[str, Tensor] = {}
    for name in files:
        shard = _read(index.parent / name)
        own = {tensor for tensor, place in places.items() if place == name}
        if not isinstance(shard, Mapping) or set(shard) != own:
            raise WeightsError(f"{index.parent / name}: holds other tensors than {index.name} says")
        tensors.update(shard)
    return tensors


def _state_dicts(content: Any, where: str) -> Iterator[_Found]:
    """Yield every dict of tensors in `content`, itself or below the usual keys."""
    if not isinstance(content, Mapping) or where.count(".") >= _DEPTH:
        return
    if content and all(isinstance(value, Tensor) for value in content.values()):
        yield _Found(where, {str(name): value for name, value in content.items()})
        return
    for key in _KEYS:
        if key in content:
            yield from _state_dicts(content[key], f"{where}.{key}".lstrip("."))


def _choose(module: nn.Module, found: list[_Found], path: Path, key: str) -> _Found:
    names = ", ".join(f"{one.where!r} ({len(one.tensors)} tensors)" for one in found if one.where)
    if key:
        for one in found:
            if one.where == key:
                return one
        raise WeightsError(f"{path}: no state dict under {key!r}; there is {names or 'one, without a key'}")
    if not found:
        raise WeightsError(
            f"{path}: holds no state dict, itself or under a usual key ({', '.join(_KEYS[:4])} …); save "
            f"model.state_dict() alone"
        )
    fitting = [one for one in found if state_dicts.fits(module, list(_unwrapped(module, one.tensors)[0]))] or found
    if len(fitting) > 1:
        raise WeightsError(f"{path}: holds several state dicts: {names}; choose one with --weights-key")
    return fitting[0]


def _unwrapped(module: nn.Module, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Return the tensors under the module's own names, and a line where something was taken off.

    What wrappers put before names goes only where the names do not fit as they are.
    """
    now = dict(tensors)
    if state_dicts.fits(module, list(now)):
        return now, ""
    counter = "n_averaged" in now and all(name.startswith("module.") for name in now if name != "n_averaged")
    if counter:  # of torch.optim.swa_utils.AveragedModel; no part of the model
        del now["n_averaged"]
    note = " and the counter of AveragedModel" if counter else ""
    for step in (_without_wrapper, _without_common):
        tried, taken = now, ""
        while not state_dicts.fits(module, list(tried)) and (shorter := step(tried)):
            taken += shorter[0]
            tried = shorter[1]
        if taken and (step is _without_wrapper or state_dicts.fits(module, list(tried))):
            return tried, f"took {taken!r} off the names in the file{note}"
    return now, ""


_Step = Callable[[Mapping[str, Tensor]], "tuple[str, dict[str, Tensor]] | None"]


def _without_wrapper(tensors: Mapping[str, Tensor]) -> tuple[str, dict[str, Tensor]] | None:
    """Take off one wrapper of the whole model, or else torch.compile's mark inside the names."""
    for wrapper in _WRAPPERS:
        if tensors and all(name.startswith(wrapper) for name in tensors):
            return wrapper, {name.removeprefix(wrapper): value for name, value in tensors.items()}
    mark = "_orig_mod."
    renamed = {name.replace(mark, ""): value for name, value in tensors.items()}
    return (mark, renamed) if set(renamed) != set(tensors) and len(renamed) == len(tensors) else None


def _without_common(tensors: Mapping[str, Tensor]) -> tuple[str, dict[str, Tensor]] | None:
    """Take off the first part of the names, where all have the same: that of the attribute that held the model."""
    first = {name.partition(".")[0] for name in tensors}
    if len(first) != 1 or not all("." in name for name in tensors):
        return None
    prefix = f"{first.pop()}."
    return prefix, {name.removeprefix(prefix): value for name, value in tensors.items()}
