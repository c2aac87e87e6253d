"""What a module returns, found by running it: names, datatypes and shapes of its outputs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from layercast.models.datatypes import datatype_of
from layercast.models.examples import Examples
from layercast.models.export.checks import ExportError, module_at
from layercast.models.export.positional import named_entries
from layercast.models.manifest import TensorSpec


@dataclass(frozen=True)
class Derived:
    """The outputs that can be served, and a line for each entry that cannot."""

    outputs: tuple[TensorSpec, ...]
    left_out: tuple[str, ...]


@dataclass(frozen=True)
class _Trial:
    """One forward: its batch and length, and everything that came back, by name."""

    batch: int
    length: int
    entries: dict[str, Any]

    def __str__(self) -> str:
        return _at(self.batch, self.length)


def derive_outputs(module: nn.Module, examples: Examples) -> Derived:
    """Run `module` on several batches and lengths and describe what it returns; entries that are None do not count.

    A size that follows the lengths is dynamic (-1). What is no tensor, or has no row for each row of the batch, is left
    out with a reason. ExportError when the module fails or nothing is left.
    """
    first, *further = examples.lengths()
    tried = [(2, first), (3, first), (1, first), *((2, length) for length in further)]
    trials = [_Trial(batch, length, _run(module, examples, batch, length, length != first)) for batch, length in tried]
    names = list(trials[0].entries)
    for trial in trials[1:]:
        if list(trial.entries) != names:
            raise ExportError(f"it returns {names} at {trials[0]}, but {list(trial.entries)} at {trial}")
    outputs, left_out = [], []
    for name in names:
        reason = _refusal(name, trials)
        if reason:
            left_out.append(f"output {name} left out: {reason}")
        else:
            outputs.append(_spec(name, [trial.entries[name] for trial in trials]))
    if not outputs:
        raise ExportError(f"it returns nothing that can be served: {'; '.join(left_out) or 'no tensor at all'}")
    return Derived(tuple(outputs), tuple(left_out))


def _run(module: nn.Module, examples: Examples, batch: int, length: int, is_other: bool) -> dict[str, Any]:
    try:
        with torch.no_grad():
            result = module(**examples.make(batch, length))
    except Exception as error:
        first = next(iter(str(error).splitlines()), "")
        hint = "; bound the dynamic size with <=MAX, or fix it" if is_other else ""
        raise ExportError(
            f"{module_at(error, module)} fails on the example at {_at(batch, length)}: {type(error).__name__}: "
            f"{first}{hint}"
        ) from error
    try:
        entries = named_entries(result)
    except ValueError as error:
        raise ExportError(str(error)) from None
    return {name: value for name, value in entries.items() if value is not None}


def _refusal(name: str, trials: Sequence[_Trial]) -> str:
    """Return why the entry `name` cannot be an output, or "" when it can."""
    for trial in trials:
        value = trial.entries[name]
        if not isinstance(value, Tensor):
            return f"it is a {type(value).__name__}, not a tensor"
        if datatype_of(value.dtype) is None:
            return f"values of {value.dtype} cannot be sent"
        if value.dim() == 0 or value.shape[0] != trial.batch:
            return f"its shape is {list(value.shape)} at {trial}, which is not one row for each row of the batch"
        if value.dim() != trials[0].entries[name].dim():
            return "its number of dimensions changes"
    two, three = (trial.entries[name].shape[1:] for trial in trials[:2])
    return "" if two == three else f"its shape besides the rows changes with the batch: {list(two)}, {list(three)}"


def _spec(name: str, values: Sequence[Tensor]) -> TensorSpec:
    sizes = zip(*(value.shape[1:] for value in values), strict=True)
    shape = (-1, *(found[0] if len(set(found)) == 1 else -1 for found in sizes))
    return TensorSpec(name=name, datatype=datatype_of(values[0].dtype) or "", shape=shape)


def _at(batch: int, length: int) -> str:
    return f"batch {batch}" + (f", length {length}" if length else "")
