"""`layercast evaluate NAME --data DIR`: measure a model's accuracy on its test split, offline or on a server."""

import argparse
import json
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layercast.models.commands.train import NAMES, add_data_arguments

if TYPE_CHECKING:
    from layercast.models.training.evaluation import Subject


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `layercast evaluate`."""
    parser.add_argument("name", choices=NAMES, help="which model")
    add_data_arguments(parser)
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--url", metavar="HOST:PORT", help="ask a running server instead of computing here")
    place.add_argument(
        "--repository",
        type=Path,
        metavar="DIR",
        help="measure the artefact DIR/NAME/VERSION (default: the zoo's weights)",
    )
    parser.add_argument("--version", type=_version, metavar="N", help="version of the model (default: the newest)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Measure and print; the figures of an artefact and of a server that serves it are the same."""
    from layercast.models.training import evaluation
    from layercast.models.training.recipes import recipe as find_recipe

    if args.version is not None and not args.url and args.repository is None:
        print("layercast: --version needs --repository or --url; the zoo has one version", file=sys.stderr)
        return 2
    with _subject(args) as subject:
        recipe = evaluation.recipe_for(find_recipe(args.name), subject)
        data = recipe.load_data(args.data, args.download, lambda line: print(line, file=sys.stderr))
        print(f"{len(data.test_inputs):,} test rows of {data.name}, {subject.where}", file=sys.stderr)
        measured = evaluation.measure(subject, recipe, data)
    heading = {"model": subject.name, "version": subject.version, "where": subject.where, "data": data.name}
    if args.json:
        print(json.dumps({**heading, "rows": len(data.test_inputs), **measured}))
    else:
        _print(subject, measured)
    return 0


def _subject(args: argparse.Namespace) -> "AbstractContextManager[Subject]":
    from layercast.models.training import evaluation

    if args.url:
        return evaluation.on_server(args.url, args.name, args.version)
    if args.repository is not None:
        return nullcontext(evaluation.from_repository(args.repository, args.name, args.version))
    return nullcontext(evaluation.from_zoo(args.name))


def _print(subject: "Subject", measured: dict[str, Any]) -> None:
    claim = "" if subject.claimed is None else f"  (its card says {subject.claimed:.2%})"
    print(f"{subject.name} {subject.version}  accuracy {measured['accuracy']:.2%}{claim}")
    width = max(len("class"), *map(len, measured["classes"]))
    print(f"{'class'.ljust(width)}  precision  recall      F1")
    for label, figures in measured["classes"].items():
        print(f"{label.ljust(width)}  {figures['precision']:9.4f}  {figures['recall']:6.4f}  {figures['f1']:6.4f}")


def _version(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"want a whole number from 1, got {text!r}")
    return int(text)
