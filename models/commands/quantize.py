"""The options `--quantize int8`, `--data` and `--calibration` of `layercast export`."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from layercast.models.manifest import Int8, TensorSpec

if TYPE_CHECKING:
    from layercast.models.export.calibration import Calibration

_CALIBRATION_ROWS: Final = 256
_MEASURED_ROWS: Final = 2000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    group = parser.add_argument_group("an int8 program beside the others")
    group.add_argument("--quantize", choices=["int8"], help="also write model.int8.onnx, and what it costs")
    rows = group.add_mutually_exclusive_group()
    rows.add_argument(
        "--data", metavar="DIR", help="calibrate a model of the zoo on its data set in DIR, as train and evaluate do"
    )
    rows.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE.npz",
        help="calibrate on these rows: an array for every input by name, and `targets` (true classes) if known",
    )


def fault(args: argparse.Namespace) -> str:
    """Return what is wrong with the options, "" for nothing."""
    given = args.data is not None or args.calibration is not None
    if args.quantize and not given:
        return "--quantize wants rows to calibrate on: --data DIR or --calibration FILE.npz"
    return "--data and --calibration go with --quantize int8" if given and not args.quantize else ""


def calibration_of(args: argparse.Namespace, inputs: Sequence[TensorSpec], name: str) -> "Calibration | None":
    """Return the rows that the options name for the model `name`; ValueError when they cannot be had or used."""
    if not args.quantize:
        return None
    from layercast.models.export.calibration import Calibration

    if args.calibration is not None:
        return Calibration.from_npz(args.calibration, inputs)
    import torch

    from layercast.models.training.recipes import recipe as find_recipe

    recipe = find_recipe(name)
    data = recipe.load_data(args.data)

    def pick(rows: torch.Tensor, count: int) -> torch.Tensor:
        return rows[torch.linspace(0, len(rows) - 1, min(count, len(rows))).long()]

    def prepared(rows: torch.Tensor, count: int) -> dict[str, "torch.Tensor"]:
        return {inputs[0].name: recipe.prepare(pick(rows, count)).contiguous()}

    calibrate, held_out = prepared(data.train_inputs, _CALIBRATION_ROWS), prepared(data.test_inputs, _MEASURED_ROWS)
    return Calibration(
        f"{data.name}: training rows to calibrate, test rows to measure",
        {name: rows.numpy() for name, rows in calibrate.items()},
        {name: rows.numpy() for name, rows in held_out.items()},
        pick(data.test_targets, _MEASURED_ROWS).numpy(),
    )


def summary(int8: Int8) -> str:
    """Return the figures in one line."""
    parts = [f"max difference {int8.largest_difference:.1e}", f"mean {int8.mean_difference:.1e}"]
    if int8.agreement is not None:
        parts.append(f"same class {int8.agreement:.2%}")
    if int8.accuracy:
        parts.append(f"accuracy {int8.accuracy['onnx']:.2%} -> {int8.accuracy['onnx-int8']:.2%}")
    calibrated = f", {int8.calibration_rows:,} rows to calibrate" if int8.calibration_rows else ""
    return f"{', '.join(parts)} on {int8.measured_rows:,} rows ({int8.method}{calibrated})"
