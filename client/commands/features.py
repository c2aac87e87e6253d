"""`layercast features MODEL INPUT ... --layers GLOB`: what the layers inside a model computed."""

import argparse
import math
from pathlib import Path

import numpy as np

from layercast.client.commands.common import (
    add_input_arguments,
    add_server_arguments,
    chosen_inputs,
    connect,
    picture_path,
    print_json,
    print_table,
    row_names,
    shape_text,
)
from layercast.client.files import save_arrays
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
    parser.add_argument(
        "--plot", type=picture_path, metavar="FILE.png", help="draw the values, a panel for each layer and row"
    )
    add_server_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Extract the layers for all inputs in one batch; print or save them."""
    with connect(arguments) as client:
        metadata = client.metadata(arguments.model, version=arguments.version)
        sources = chosen_inputs(arguments, metadata)
        batch = prepare(sources, metadata)
        arrays = client.features(
            arguments.model, batch, arguments.layers, reduce=arguments.reduce, version=arguments.version
        )
    if arguments.output is not None:
        save_arrays(arrays, arguments.output)
    if arguments.plot is not None:
        # Late: a table or a file needs no Pillow.
        from layercast.client.drawing import canvas, features

        figure = features.figure(batch, arrays, row_names(sources, len(batch)), metadata.preprocessing)
        canvas.save(figure, arguments.plot)
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
