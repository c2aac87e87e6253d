"""The form in which programs are exported: tensors in and out, in the order of the card's inputs and outputs."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor, nn


def named_entries(result: Any) -> dict[str, Any]:
    """Return everything that a module returned under a name, tensors or not.

    Dicts, named tuples and dataclasses name their entries themselves; those of other tuples and lists are `output_0`,
    `output_1` …, a single tensor is `output`. ValueError for anything else.
    """
    if isinstance(result, Tensor):
        return {"output": result}
    if isinstance(result, Mapping):
        return {str(key): value for key, value in result.items()}
    if isinstance(result, tuple) and hasattr(result, "_fields"):
        return dict(zip(result._fields, result, strict=True))
    if isinstance(result, list | tuple):
        return {f"output_{index}": value for index, value in enumerate(result)}
    if is_dataclass(result) and not isinstance(result, type):
        return {entry.name: getattr(result, entry.name) for entry in fields(result)}
    raise ValueError(f"the model returned {type(result).__name__}; want a tensor, tuple, dict or dataclass of tensors")


def named_outputs(result: Any, names: Sequence[str]) -> dict[str, Tensor]:
    """Return what a module returned by output name.

    A dict, a dataclass, and a tuple with other entries than the outputs, give the entries called `names` (as in
    `named_entries`); a tensor or a tuple of just as many tensors gives them in order. ValueError says what came when
    neither fits.
    """
    try:
        entries = named_entries(result)
    except ValueError as error:
        raise ValueError(f"want outputs {list(names)}, {error}") from None
    ordered = isinstance(result, Tensor | list | tuple)
    if ordered and len(entries) == len(names):
        entries = dict(zip(names, entries.values(), strict=True))
    found = {name: entries[name] for name in names if isinstance(entries.get(name), Tensor)}
    if len(found) < len(names):
        came = [type(value).__name__ for value in entries.values()] if ordered else f"a dict with {list(entries)}"
        raise ValueError(f"want outputs {list(names)}, the model returned {came}")
    return found


class Positional(nn.Module):
    """Takes tensors in the order of `inputs` and returns them in the order of `outputs`.

    `forward(*inputs)` gives a tensor for one output, a tuple for several.
    """

    def __init__(self, module: nn.Module, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        super().__init__()
        self.module = module
        self.inputs = tuple(inputs)
        self.outputs = tuple(outputs)
        self.train(module.training)

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Return the outputs in order."""
        result = self.module(**dict(zip(self.inputs, inputs, strict=True)))
        values = tuple(named_outputs(result, self.outputs).values())
        return values[0] if len(values) == 1 else values
