"""Writes an artefact: checks, layer index, weights, programs with their parity, golden values, manifest."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import safetensors.torch
import torch
from torch import nn
from torch.export import ExportedProgram

from layercast.models.artefact import build, load_weights, save_weights
from layercast.models.card import Card
from layercast.models.examples import Examples
from layercast.models.export import exported, onnx, onnx_values, parity, torchscript
from layercast.models.export.calibration import Calibration
from layercast.models.export.checks import ExportError, check_interface, check_rows, check_state
from layercast.models.export.int8 import write as quantise
from layercast.models.export.positional import Positional, named_outputs
from layercast.models.export.staging import refuse_existing, staged
from layercast.models.foreign.factory import Code
from layercast.models.foreign.trust import Trust
from layercast.models.layer_index import build_index
from layercast.models.manifest import (
    GOLDEN_FILE,
    PROGRAM_FILES,
    WEIGHTS_FILE,
    Int8,
    LayerSpec,
    Manifest,
    Program,
    file_entry,
)
from layercast.models.versions import tool_versions

PROGRAMS: Final[tuple[Program, ...]] = ("torchscript", "onnx", "exported")
GOLDEN_ROWS: Final = 4
_GOLDEN_SEED: Final = 20


@dataclass(frozen=True)
class Written:
    """One program that passed its parity check: largest difference by batch size, seconds to write and check it.

    `values` tells which of its values carries a layer, by path; only those of the program `onnx` are looked for.
    """

    program: Program
    parity: dict[int, float]
    seconds: float
    values: Mapping[str, str]

    @property
    def largest(self) -> float:
        """The largest difference of all batch sizes."""
        return max(self.parity.values())


def export_artefact(
    module: nn.Module,
    card: Mapping[str, Any],
    directory: Path | str,
    *,
    programs: Sequence[Program] = PROGRAMS,
    force: bool = False,
    report: Callable[[Written], None] = lambda written: None,
    code: Code | None = None,
    left_out: Callable[[Program, str], None] | None = None,
    calibration: Calibration | None = None,
) -> Manifest:
    """Export `module`, in eval mode on the CPU, as the version that `directory` (…/NAME/VERSION) is named after.

    Everything is written beside `directory` and renamed into place once all checks have passed, so that a directory
    of that name is always whole. An existing one is refused unless `force`. `report` is told of every program. `code`
    is the source file that the architecture comes from, and is kept in the artefact. With `left_out`, a program that
    cannot be written is told to it with the reason, and the others do; without it, every program must come out right.
    With `calibration`, the ONNX program is also quantised to int8, and the manifest says what that costs.
    ExportError says which module or program is at fault.
    """
    directory = Path(directory)
    checked = Card.check(card)
    version = _version(directory)
    refuse_existing(directory, force)
    examples = Examples.of(checked)
    check_state(module, checked)
    check_interface(module, checked, examples)
    layers = build_index(module, examples)
    check_rows(module, checked, examples, layers)
    with staged(directory, force) as stage:
        save_weights(module, stage / WEIGHTS_FILE)
        if code:
            (stage / code.name).write_bytes(code.content)
        _check_weights(module, checked, examples, stage, code)
        _write_golden(module, checked, stage)
        writer = _Programs(module, checked, examples, stage, layers)
        written = list(_write_programs(writer, programs, report, left_out))
        int8 = _write_int8(checked, stage, calibration) if calibration else None
        manifest = _manifest(checked, version, code, layers, written, int8, stage)
        manifest.write(stage)
    return manifest


def _manifest(
    card: Card, version: int, code: Code | None, layers: Sequence[LayerSpec], written: Sequence[Written],
    int8: Int8 | None, stage: Path,
) -> Manifest:  # fmt: skip
    """Return the manifest of what `stage` holds, which is everything but the manifest."""
    made: list[Program] = [done.program for done in written]
    if int8:
        made.append("onnx-int8")
    return Manifest(
        name=card.name,
        version=version,
        description=card.description,
        architecture=card.architecture,
        arguments=card.arguments,
        code=code.name if code else "",
        inputs=card.inputs,
        outputs=card.outputs,
        preprocessing=card.preprocessing,
        labels=card.labels,
        layers=tuple(layers),
        onnx_values={path: value for done in written for path, value in done.values.items()},
        programs={program: PROGRAM_FILES[program] for program in made},
        parity={done.program: done.parity for done in written},
        opsets=_opsets(stage),
        int8=int8,
        metrics=card.metrics,
        licence=card.licence,
        data=card.data,
        files={path.name: file_entry(path) for path in sorted(stage.iterdir())},
        tools=tool_versions(),
    )


def _version(directory: Path) -> int:
    if not directory.name.isdecimal() or int(directory.name) < 1:
        raise ExportError(f"{directory}: the last part must be the version, a whole number from 1")
    return int(directory.name)


def _write_programs(
    writer: "_Programs", programs: Sequence[Program], report: Callable[[Written], None],
    left_out: Callable[[Program, str], None] | None,
) -> Iterator[Written]:  # fmt: skip
    reasons = []
    for program in programs:
        try:
            done = writer.write(program)
        except ExportError as error:
            if left_out is None:
                raise
            writer.path(program).unlink(missing_ok=True)
            reasons.append(str(error).removeprefix(f"{writer.name}: "))
            left_out(program, str(error))
            continue
        report(done)
        yield done
    if programs and len(reasons) == len(programs):
        raise ExportError(f"{writer.name}: no program could be written: {reasons[0]}")


def _write_int8(card: Card, stage: Path, calibration: Calibration) -> Int8:
    source = stage / PROGRAM_FILES["onnx"]
    if not source.exists():
        raise ExportError(f"{card.name}: int8 is made from the program onnx, which is not there")
    golden = Examples.of(card, seed=_GOLDEN_SEED)
    return quantise(source, stage / PROGRAM_FILES["onnx-int8"], card, calibration, golden, GOLDEN_ROWS)


def _opsets(stage: Path) -> dict[str, int]:
    path = stage / PROGRAM_FILES["onnx"]
    return onnx.opsets(path.read_bytes()) if path.exists() else {}


class _Programs:
    """Writes programs of one module and holds them against it."""

    def __init__(self, module: nn.Module, card: Card, examples: Examples, stage: Path, layers: list[LayerSpec]) -> None:
        self.name = card.name
        self._card = card
        self._examples = examples
        self._stage = stage
        self._layers = layers
        self._outputs = [spec.name for spec in card.outputs]
        self._wrapped = Positional(module, [spec.name for spec in card.inputs], self._outputs)
        self._inputs = examples.make(exported.EXAMPLE_BATCH)
        self._tried = parity.cases(module, examples, self._outputs)

    @cached_property
    def _captured(self) -> ExportedProgram:
        return exported.capture(self._wrapped, self._inputs, self._card.inputs, self.name)

    def path(self, program: Program) -> Path:
        """Return where `program` is written."""
        return self._stage / PROGRAM_FILES[program]

    def write(self, program: Program) -> Written:
        """Write `program` and find out how far it is from the module."""
        path, card, start = self.path(program), self._card, time.perf_counter()
        scopes: onnx_values.Scopes = {}
        if program == "torchscript":
            torchscript.write(self._wrapped, self._inputs, path, card.name)
            run = parity.torch_runner(torchscript.load_bytes(path.read_bytes()))
        elif program == "onnx":
            scopes = onnx.write(self._captured, self._inputs, card.inputs, self._outputs, path, card.name)
            run = parity.onnx_runner(path.read_bytes(), self._outputs)
        else:
            exported.write(self._captured, path)
            run = parity.torch_runner(exported.load_bytes(path.read_bytes()))
        differences = parity.measure(program, run, self._tried, card.name)
        values: dict[str, str] = {}
        if program == "onnx":
            module, content = self._wrapped.module, path.read_bytes()
            values = onnx_values.find(module, self._examples, self._layers, content, scopes)
        return Written(program, differences, time.perf_counter() - start, values)


def _check_weights(module: nn.Module, card: Card, examples: Examples, stage: Path, code: Code | None) -> None:
    """Refuse an architecture that cannot be built again, or that gives other answers with these weights."""
    trust = Trust.naming(card.architecture, code is not None)  # its code made `module`, in this process
    again = build(card.architecture, card.arguments, trust, code)
    load_weights(again, (stage / WEIGHTS_FILE).read_bytes(), WEIGHTS_FILE)
    outputs = [spec.name for spec in card.outputs]
    inputs = examples.make(2)
    with torch.inference_mode():
        expected = named_outputs(module(**inputs), outputs)
        results = named_outputs(again.eval()(**inputs), outputs)
    for name in outputs:
        if not torch.allclose(results[name], expected[name], rtol=0, atol=parity.LIMIT, equal_nan=True):
            raise ExportError(
                f"{card.name}: {card.architecture} built from the card's arguments and the saved weights gives another "
                f"{name!r} than the module; something that matters is neither an argument, a parameter nor a buffer"
            )


def _write_golden(module: nn.Module, card: Card, stage: Path) -> None:
    inputs = Examples.of(card, seed=_GOLDEN_SEED).make(GOLDEN_ROWS)
    with torch.inference_mode():
        outputs = named_outputs(module(**inputs), [spec.name for spec in card.outputs])
    tensors = {f"input.{name}": value for name, value in inputs.items()}
    tensors |= {f"output.{name}": value.contiguous().clone() for name, value in outputs.items()}
    (stage / GOLDEN_FILE).write_bytes(safetensors.torch.save(tensors))
