"""`layercast features MODEL INPUT ... --layers GLOB`: what the layers inside a model computed."""

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np

from layercast.client.commands.common import (
    add_input_arguments,
    add_server_arguments,
    chosen_inputs,
    connect,
    print_json,
    print_table,
    shape_text,
)
from layercast.client.errors import InputError
from layercast.client.preprocess import prepare
from layercast.proto.codec import AnyArray


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    add_input_arguments(parser)
    parser.add_argument(
        "--layers",
        nargs="+",
        action="extend",
        required=True,
        metavar="GLOB",
        help="layers by path, 'net.*' for example, each with an optional @reducer; `layercast layers MODEL` lists them",
    )
    parser.add_argument(
        "--reduce", metavar="REDUCER", help="none, mean, max, cls, last, heads, flatten, norm, proj64 …"
    )
    parser.add_argument("--output", type=Path, metavar="FILE.npz", help="save the arrays instead of printing a table")
    add_server_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Extract the layers for all inputs in one batch; print or save them."""
    with connect(arguments) as client:
        metadata = client.metadata(arguments.model, version=arguments.version)
        batch = prepare(chosen_inputs(arguments, metadata), metadata)
        arrays = client.features(
            arguments.model, batch, arguments.layers, reduce=arguments.reduce, version=arguments.version
        )
    if arguments.output is not None:
        _save(arrays, arguments.output)
    if arguments.json:
        print_json(
            {
                name: {"shape": array.shape, "dtype": str(array.dtype), "mean": _mean(array)}
                for name, array in arrays.items()
            }
        )
    elif arguments.output is None:
        rows = [
            (name, shape_text(array.shape), str(array.dtype), f"{_mean(array):.6g}") for name, array in arrays.items()
        ]
        print_table(("layer", "shape", "dtype", "mean"), rows)
    else:
        print(f"{len(arrays)} layers of {len(batch)} rows in {arguments.output}")
    return 0


def _mean(array: AnyArray) -> float:
    return float(array.astype(np.float64).mean()) if array.size and array.dtype.kind in "biuf" else math.nan


def _save(arrays: dict[str, AnyArray], path: Path) -> None:
    """Write beside the target first, so that a failure leaves no half file in its place."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("wb") as file:
            named: dict[str, Any] = dict(arrays)
            np.savez(file, **named)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise InputError(f"{path}: {error.strerror}") from error
