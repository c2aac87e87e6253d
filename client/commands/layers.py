"""`layercast layers MODEL [GLOB]`: which layers of a model can be asked for."""

import argparse
from dataclasses import asdict

from layercast.client.commands.common import add_server_arguments, connect, print_json, print_table, shape_text
from layercast.client.types import LayerInfo


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("model", help="name of the model")
    parser.add_argument("pattern", nargs="?", default="*", metavar="GLOB", help="only paths that match (all)")
    parser.add_argument("--version", default="", metavar="N", help="version of the model (the newest)")
    add_server_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the layers in the order in which they finish."""
    with connect(arguments) as client:
        found = client.layers(arguments.model, arguments.pattern, version=arguments.version)
    if arguments.json:
        print_json([asdict(layer) for layer in found])
    else:
        print_table(("layer", "type", "shape", "datatype", "parameters", ""), [_cells(layer) for layer in found])
    return 0


def _cells(layer: LayerInfo) -> tuple[str, ...]:
    note = "" if layer.available else f"not available: {layer.reason}"
    return layer.path, layer.type, shape_text(layer.shape), layer.datatype, f"{layer.parameters:,}", note
