"""Exports a module that is not ours: build it, load its weights, find out what it returns, write the artefact."""

import difflib
import inspect
import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from layercast.models.examples import Examples
from layercast.models.export.calibration import Calibration
from layercast.models.export.checks import ExportError, module_at
from layercast.models.export.positional import named_outputs
from layercast.models.export.staging import refuse_existing
from layercast.models.export.writer import Written, export_artefact
from layercast.models.foreign.factory import Code, build
from layercast.models.foreign.inputs import InputFault, parse_inputs
from layercast.models.foreign.outputs import derive_outputs
from layercast.models.foreign.trust import Trust
from layercast.models.foreign.weights import load_file
from layercast.models.manifest import Manifest, Program, TensorSpec

SEED: Final = 0
"""What torch's generator is set to before a factory runs, so that its own initial weights are the same each time."""

_PADDED_BY: Final = 3
_PADDING_LIMIT: Final = 1e-4


@dataclass(frozen=True)
class Order:
    """What a person asked for. `architecture` is `package.module:factory`, or `net.py:factory` with its `code`."""

    architecture: str
    examples: Sequence[str]
    name: str
    code: Code | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    weights: Path | None = None
    weights_key: str = ""
    labels: Sequence[str] = ()
    description: str = ""


def export_module(
    order: Order,
    directory: Path,
    *,
    force: bool,
    report: Callable[[Written], None],
    say: Callable[[str], None],
    calibrate: Callable[[Sequence[TensorSpec]], Calibration | None] = lambda inputs: None,
) -> Manifest:
    """Export what `order` names as the version `directory` (…/NAME/VERSION); `say` is told of every decision.

    `calibrate` gives the rows for an int8 program of a module with such inputs, or None for no such program.
    NameFault or InputFault when the order itself is wrong; another ValueError when the code, the weights or the module
    cannot be used.
    """
    refuse_existing(directory, force)
    specs = parse_inputs(order.examples)
    trust = Trust.naming(order.architecture, order.code is not None)
    torch.manual_seed(SEED)
    module = build(order.architecture, order.arguments, trust, order.code)
    if order.weights:
        for line in load_file(module, order.weights, order.weights_key):
            say(line)
    else:
        say(f"no --weights: exporting the weights that the factory itself gives (torch.manual_seed({SEED}))")
    module.eval()
    inputs = _in_order(module, specs)
    for spec in inputs:
        if "INT" in spec.datatype and spec.range is None:
            say(f"input {spec.name} has no value range: a server will take any number; give one as {{LOW..HIGH}}")
    with _quiet():
        try:
            return _export(module, inputs, order, directory, force, report, say, calibrate(inputs))
        except ExportError:
            raise
        except (RuntimeError, TypeError, AttributeError, LookupError, ArithmeticError) as error:
            first = next(iter(str(error).splitlines()), "")
            raise ExportError(f"{module_at(error, module)} failed: {type(error).__name__}: {first}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Mute warnings of other people's code while it is traced, and the pages that torch logs and prints where that
    fails: what matters is raised.
    """
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _export(
    module: nn.Module, inputs: Sequence[TensorSpec], order: Order, directory: Path, force: bool,
    report: Callable[[Written], None], say: Callable[[str], None], calibration: Calibration | None,
) -> Manifest:  # fmt: skip
    examples = Examples(inputs)
    derived = derive_outputs(module, examples)
    for line in derived.left_out:
        say(line)
    for spec in derived.outputs:
        say(f"output {spec.name} {spec.datatype} {list(spec.shape)}")
    _check_labels(order.labels, derived.outputs)
    _check_padding(module, examples, derived.outputs)
    card = {
        "name": order.name,
        "description": order.description,
        "architecture": order.architecture,
        "arguments": order.arguments,
        "labels": order.labels,
        "inputs": inputs,
        "outputs": derived.outputs,
    }

    def left_out(program: Program, reason: str) -> None:
        say(f"{program} left out: {reason.removeprefix(f'{order.name}: ')}")

    return export_artefact(
        module, card, directory,
        force=force, report=report, calibration=calibration, code=order.code, left_out=left_out,
    )  # fmt: skip


def default_name(architecture: str) -> str:
    """Return the factory's own name as a model's: `net.py:Net` gives `net`."""
    return re.sub(r"[^a-z0-9._-]", "-", architecture.rpartition(":")[2].rpartition(".")[2].lower()).lstrip("._-")


def _in_order(module: nn.Module, specs: Sequence[TensorSpec]) -> list[TensorSpec]:
    """Return the inputs in the order of forward's arguments; InputFault for one it has not, or one it lacks."""
    kinds = inspect.Parameter
    parameters = inspect.signature(module.forward).parameters
    named = [p for p in parameters.values() if p.kind not in (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD)]
    kind = type(module).__name__
    for parameter in named:
        if parameter.kind is kinds.POSITIONAL_ONLY:
            raise InputFault(f"{kind}.forward takes {parameter.name} by place only; wrap it in a module that names it")
    order = [parameter.name for parameter in named]
    if not order:
        raise InputFault(f"{kind}.forward names no argument; wrap it in a module whose forward does")
    given = {spec.name: spec for spec in specs}
    for name in given:
        # forward's **kwargs would take a misspelt name, and most modules ignore what they find there.
        if name not in order:
            near = difflib.get_close_matches(name, order, n=3) or order
            raise InputFault(f"{kind}.forward has no argument {name!r}; nearest: {', '.join(near)}")
    for parameter in named:
        if parameter.default is kinds.empty and parameter.name not in given:
            raise InputFault(f"{kind}.forward needs {parameter.name}; describe it with one more --example")
    return [given[name] for name in order if name in given]


def _check_labels(labels: Sequence[str], outputs: Sequence[TensorSpec]) -> None:
    if labels and not any(len(spec.shape) > 1 and spec.shape[-1] == len(labels) for spec in outputs):
        sizes = ", ".join(f"{spec.name} {list(spec.shape)}" for spec in outputs)
        raise ExportError(f"{len(labels)} labels, but no output has that many classes: {sizes}")


def _check_padding(module: nn.Module, examples: Examples, outputs: Sequence[TensorSpec]) -> None:
    """Refuse a padding value that changes answers: a server joins rows of other lengths once all inputs have one."""
    dynamic = [spec for spec in examples.specs if spec.dynamic_dimensions()]
    fixed = [spec.name for spec in outputs if not spec.dynamic_dimensions()]
    if not dynamic or not fixed or any(spec.pad is None for spec in dynamic):
        return
    length = min(10, min(spec.max_length or 10 + _PADDED_BY for spec in dynamic) - _PADDED_BY)
    if length < 1:
        return
    rows = examples.make(3, length)
    padded = {
        spec.name: nn.functional.pad(rows[spec.name], (0, _PADDED_BY), value=spec.pad or 0)
        if spec in dynamic
        else rows[spec.name]
        for spec in examples.specs
    }
    with torch.no_grad():
        short, long = (named_outputs(module(**given), fixed) for given in (rows, padded))
    for name in fixed:
        if not torch.allclose(short[name], long[name], rtol=0, atol=_PADDING_LIMIT, equal_nan=True):
            raise ExportError(
                f"padding changes output {name!r} by {(short[name] - long[name]).abs().max():.2g}; the module must "
                f"mask what is padded, else leave `pad` and `mask` out, and rows of one length run together"
            )
