"""What a model consists of: a tree of its modules with types, output shapes, parameters, buffers and multiply-adds.

The lines one level in are the model's `named_children`; all lines together are its `named_modules`. A module that is
reached twice has a line at each place, which says so; it and shared parameters count once, where they are met first.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

Inputs = Tensor | Sequence[Any] | Mapping[str, Any]
"""One tensor, positional arguments, or arguments by name."""

_FUSED_LIBRARIES: tuple[Any, ...] = (torch.backends.mkldnn, torch.backends.cudnn)
_HEADER = ("module", "type", "output", "trainable", "frozen", "buffers", "multiply-adds", "")


@dataclass
class Run:
    """What one forward pass showed of a module; `output` is the shape of its last call."""

    calls: int = 0
    multiply_adds: int = 0
    output: str = "-"


@dataclass(frozen=True)
class Row:
    """One place in the tree. Counts are of this module alone, without the modules below it, unless `Summary.up_to`
    has folded those into it. Shared tensors count once.
    """

    path: str
    kind: str
    run: Run
    trainable: int
    frozen: int
    buffers: int
    tensors: tuple[str, ...]
    note: str

    @property
    def depth(self) -> int:
        """0 for the model itself, 1 for its children."""
        return self.path.count(".") + 1 if self.path else 0


@dataclass(frozen=True)
class Summary:
    """All rows, the model itself first, and the sums over them."""

    rows: tuple[Row, ...]
    inputs: str
    children: int
    modules: int

    @property
    def trainable(self) -> int:
        """Elements of parameters that require gradients."""
        return sum(row.trainable for row in self.rows)

    @property
    def frozen(self) -> int:
        """Elements of parameters that don't require gradients."""
        return sum(row.frozen for row in self.rows)

    @property
    def parameters(self) -> int:
        """Elements of all parameters."""
        return self.trainable + self.frozen

    @property
    def buffers(self) -> int:
        """Elements of all buffers, those that a state dict leaves out too."""
        return sum(row.buffers for row in self.rows)

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of one forward pass on the example inputs."""
        return sum(row.run.multiply_adds for row in self.rows)

    def up_to(self, depth: int) -> "Summary":
        """Return the rows down to `depth`, the deepest of them with what lies below added in: the sums stay."""
        kept: list[Row] = []
        for row in self.rows:
            if row.depth <= depth:
                kept.append(row)
                continue
            above = kept[-1]
            run = replace(above.run, multiply_adds=above.run.multiply_adds + row.run.multiply_adds)
            kept[-1] = replace(
                above,
                run=run,
                trainable=above.trainable + row.trainable,
                frozen=above.frozen + row.frozen,
                buffers=above.buffers + row.buffers,
            )
        return replace(self, rows=tuple(kept))

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values, for JSON."""
        totals = ("inputs", "children", "modules", "parameters", "trainable", "frozen", "buffers", "multiply_adds")
        rows = [_flat(row) for row in self.rows]
        return {**{name: getattr(self, name) for name in totals}, "rows": rows}


def summarise(model: nn.Module, example_inputs: Inputs) -> Summary:
    """Run `model` once in eval mode without gradients, and count.

    Multiply-adds are those of matrix products, convolutions and attention for the whole batch of the example, each
    module without its children; element-wise work isn't counted. Modes and hooks are left as they were.
    Raises what the model raises on inputs that it can't take.
    """
    runs = _observe(model, example_inputs)
    children = sum(1 for _ in model.named_children())
    return Summary(tuple(_rows(model, runs)), _shape(example_inputs), children, modules=len(runs))


def render(summary: Summary, *, parameters: bool = False) -> str:
    """Return the summary as text: a line per module, with `parameters` one per parameter and buffer too, and totals."""
    table: list[tuple[str, ...]] = [_HEADER]
    for row in summary.rows:
        table.append(_cells(row))
        if parameters:
            table += [("  " * (row.depth + 1) + tensor, *[""] * (len(_HEADER) - 1)) for tensor in row.tensors]
    widths = [max(len(cells[column]) for cells in table) for column in range(len(_HEADER))]
    lines = [_line(cells, widths) for cells in table]
    rule = "-" * max(len(line) for line in lines)
    return "\n".join([lines[0], rule, *lines[1:], rule, *_totals(summary)])


def _observe(model: nn.Module, example_inputs: Inputs) -> dict[nn.Module, Run]:
    """One forward pass, with hooks on every module that take its calls, its output and its own multiply-adds."""
    runs = {module: Run() for module in model.modules()}
    counter = FlopCounterMode(display=False)
    # Of each call under way: the operations before it, and those that calls inside it took.
    under_way: list[list[int]] = []

    def before(module: nn.Module, _: object) -> None:
        under_way.append([counter.get_total_flops(), 0])

    def after(module: nn.Module, _: object, output: object) -> None:
        start, inside = under_way.pop()
        whole = counter.get_total_flops() - start
        if under_way:
            under_way[-1][1] += whole
        runs[module].calls += 1
        runs[module].multiply_adds += (whole - inside) // 2
        runs[module].output = _shape(output)

    with ExitStack() as stack:
        for module in runs:
            stack.callback(setattr, module, "training", module.training)
            stack.callback(module.register_forward_pre_hook(before).remove)
            stack.callback(module.register_forward_hook(after).remove)
        # torch's fused encoder path calls no inner module, so their hooks would see nothing.
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        # The counter knows matrix products and convolutions, but not all fused attention and recurrent kernels.
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        for library in _FUSED_LIBRARIES:
            stack.callback(setattr, library, "enabled", library.enabled)
            library.enabled = False
        stack.enter_context(torch.no_grad())
        stack.enter_context(counter)
        model.eval()
        _call(model, example_inputs)
    return runs


def _call(model: nn.Module, inputs: Inputs) -> None:
    if isinstance(inputs, Tensor):
        model(inputs)
    elif isinstance(inputs, Mapping):
        model(**inputs)
    else:
        model(*inputs)


def _rows(model: nn.Module, runs: Mapping[nn.Module, Run]) -> Iterator[Row]:
    first: dict[nn.Module | Tensor, str] = {}
    repeated: list[str] = []
    for path, module in model.named_modules(remove_duplicate=False):
        if any(path.startswith(f"{start}.") for start in repeated):
            continue
        kind = type(module).__name__
        if module in first:
            repeated.append(path)
            yield Row(path, kind, Run(output=runs[module].output), 0, 0, 0, (), f"same module as {first[module]}")
            continue
        first[module] = path
        yield _row(path, kind, module, runs[module], first)


def _row(path: str, kind: str, module: nn.Module, run: Run, first: dict[nn.Module | Tensor, str]) -> Row:
    """Count the tensors of one module; those that are already in `first` are named, not counted."""
    counts = {"trainable": 0, "frozen": 0, "buffer": 0}
    tensors, notes = [], [f"called {run.calls} times"] if run.calls > 1 else []
    parameters = list(module.named_parameters(recurse=False, remove_duplicate=False))
    buffers = list(module.named_buffers(recurse=False, remove_duplicate=False))
    for name, tensor in [*parameters, *buffers]:
        role = "buffer" if not isinstance(tensor, nn.Parameter) else "trainable" if tensor.requires_grad else "frozen"
        text = f"{name} {list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} {role}"
        if tensor in first:
            notes.append(f"{name} shared with {first[tensor]}")
            text += f", shared with {first[tensor]}"
        else:
            first[tensor] = f"{path}.{name}".lstrip(".")
            counts[role] += tensor.numel()
        tensors.append(text)
    return Row(
        path, kind, run, counts["trainable"], counts["frozen"], counts["buffer"], tuple(tensors), ", ".join(notes)
    )


def _shape(value: object) -> str:
    if isinstance(value, Tensor):
        return str(list(value.shape))
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_shape(item)}" for key, item in value.items()) + "}"
    if isinstance(value, tuple | list):
        return "(" + ", ".join(_shape(item) for item in value) + ")"
    return "None" if value is None else type(value).__name__


def _flat(row: Row) -> dict[str, Any]:
    flat = asdict(row)
    run = flat.pop("run")
    return {"path": flat.pop("path"), "depth": row.depth, "type": flat.pop("kind"), **run, **flat}


def _cells(row: Row) -> tuple[str, ...]:
    name = row.path.rpartition(".")[2] or "(model)"
    counts = (row.trainable, row.frozen, row.buffers, row.run.multiply_adds)
    return ("  " * row.depth + name, row.kind, row.run.output, *(f"{n:,}" if n else "-" for n in counts), row.note)


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    """Words to the left, counts to the right of their columns."""
    aligned = [
        cell.rjust(width) if 3 <= column <= 6 else cell.ljust(width)
        for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return "  ".join(aligned).rstrip()


def _totals(summary: Summary) -> list[str]:
    return [
        f"children       {summary.children:,} (named_children)",
        f"modules        {summary.modules:,} (named_modules, with the model itself)",
        f"parameters     {summary.parameters:,} ({summary.trainable:,} trainable, {summary.frozen:,} frozen)",
        f"buffers        {summary.buffers:,}",
        f"multiply-adds  {summary.multiply_adds:,} for inputs of {summary.inputs}",
    ]
