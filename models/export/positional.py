"""The form in which programs are exported: tensors in and out, in the order of the card's inputs and outputs."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn


def named_outputs(result: Any, names: Sequence[str]) -> dict[str, Tensor]:
    """Return what a module returned by output name: one tensor, a tuple in the order of `names`, or a dict with them.

    ValueError says what came when it does not fit.
    """
    if isinstance(result, Tensor):
        values: list[Any] = [result]
    elif isinstance(result, Mapping):
        missing = [name for name in names if name not in result]
        if missing:
            raise ValueError(f"want outputs {list(names)}, the model returned a dict with {list(result)}")
        values = [result[name] for name in names]
    elif isinstance(result, list | tuple):
        values = list(result)
    else:
        raise ValueError(f"want outputs {list(names)}, the model returned {type(result).__name__}")
    if len(values) != len(names) or not all(isinstance(value, Tensor) for value in values):
        raise ValueError(f"want outputs {list(names)}, the model returned {[type(value).__name__ for value in values]}")
    return dict(zip(names, values, strict=True))


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
