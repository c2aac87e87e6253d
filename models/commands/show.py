"""`layercast models show NAME`: the modules that a model consists of, with shapes, parameters and multiply-adds."""

import argparse
import json
from typing import TYPE_CHECKING, Any

from layercast.models.commands.arguments import complain, json_object

if TYPE_CHECKING:
    from torch import Tensor

    from layercast.models.lookup import Found
    from layercast.models.summary import Summary

_BAD_DATA, _BAD_ARGUMENTS = 1, 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `layercast models show`."""
    parser.add_argument(
        "name",
        help="a model of the zoo, an architecture, package.module:factory, or the folder of an artefact or a trained "
        "model",
    )
    parser.add_argument(
        "--arguments",
        type=_json_object,
        default={},
        metavar="JSON",
        help="constructor arguments of an architecture or factory, for instance '{\"num_classes\": 100}'",
    )
    parser.add_argument(
        "--example",
        action="append",
        default=[],
        metavar="NAME:DTYPE[SIZES]",
        help="an input to run it on, batch first, for instance 'image:float32[2,3,224,224]'; once for each input "
        "(default: one row as the model says, the longest it takes)",
    )
    parser.add_argument(
        "--trust",
        action="append",
        default=[],
        metavar="NAME",
        help="whose Python code may run because an artefact names it: a package, package:factory or artefact-code",
    )
    parser.add_argument(
        "--depth",
        type=_depth,
        metavar="N",
        help="show N levels, each last line with what lies below added in: 1 is named_children "
        "(default: all of named_modules)",
    )
    parser.add_argument("--parameters", action="store_true", help="list every parameter and buffer too")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print the summary; exit code 2 for a wrong name or arguments, 1 for wrong files or inputs it can't take."""
    from layercast.models import lookup
    from layercast.models.foreign.inputs import InputFault, concrete_inputs
    from layercast.models.foreign.trust import Trust
    from layercast.models.summary import render

    try:
        found = lookup.find(args.name, args.arguments, Trust.of(args.trust))
        inputs = concrete_inputs(args.example) or found.inputs()
    except (lookup.RequestError, InputFault) as error:
        return complain(str(error), _BAD_ARGUMENTS)
    summary = _summarise(found, inputs)
    if isinstance(summary, str):
        return complain(summary, _BAD_DATA)
    if args.depth is not None:
        summary = summary.up_to(args.depth)
    if args.json:
        shapes = {name: list(tensor.shape) for name, tensor in inputs.items()}
        heading = {"model": args.name, "described": found.described}
        print(json.dumps({**heading, **summary.to_dict(), "inputs": shapes}, indent=1))
    else:
        print(f"{found.described}\n\n{render(summary, parameters=args.parameters)}")
    return 0


def _summarise(found: "Found", inputs: "dict[str, Tensor]") -> "Summary | str":
    """Return the summary, or why the model could not run."""
    from layercast.models.summary import summarise

    try:
        return summarise(found.module, inputs)
    except Exception as error:  # whatever code the model runs
        shown = ", ".join(f"{name} {list(tensor.shape)} {tensor.dtype}" for name, tensor in inputs.items())
        return f"{found.described} can't run on {shown}: {type(error).__name__}: {error}; say inputs with --example"


def _json_object(text: str) -> dict[str, Any]:
    try:
        return json_object(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _depth(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"want a whole number from 0, got {text!r}")
    return int(text)
