"""`layercast explain MODEL INPUT ...`: how much each part of an input counts for what a model answers."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from layercast.client.commands.common import (
    add_input_arguments,
    add_server_arguments,
    chosen_inputs,
    connect,
    picture_path,
    positive,
    print_json,
    print_table,
    row_names,
    shape_text,
)
from layercast.client.errors import InputError
from layercast.client.files import save_arrays
from layercast.client.preprocess import prepare
from layercast.client.types import ExplainOptions, Explanation, ModelMetadata

# An explanation is many forwards: steps, samples or windows for each row.
_TIMEOUT = 60.0
_OPTIONS = tuple(ExplainOptions.__annotations__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    add_input_arguments(parser)
    parser.add_argument(
        "--method",
        default="integrated-gradients",
        metavar="NAME",
        help="saliency, input-x-gradient, smoothgrad, integrated-gradients, gradcam, occlusion or attention-rollout "
        "(%(default)s)",
    )
    parser.add_argument(
        "--target",
        nargs="+",
        metavar="CLASS",
        help="index or label to explain: one for all inputs or one for each (each input's most probable)",
    )
    parser.add_argument("--plot", type=picture_path, metavar="FILE.png", help="draw the attribution over each input")
    parser.add_argument("--output", type=Path, metavar="FILE.npz", help="save attributions, targets and delta")
    options = parser.add_argument_group("options of the methods")
    options.add_argument("--layer", metavar="GLOB", help="gradcam, attention-rollout: the layer, or layers")
    options.add_argument("--steps", type=positive, metavar="N", help="integrated-gradients")
    options.add_argument("--baseline", type=float, metavar="VALUE", help="integrated-gradients, occlusion")
    options.add_argument("--samples", type=positive, metavar="N", help="smoothgrad")
    options.add_argument("--noise", type=float, metavar="SHARE", help="smoothgrad")
    options.add_argument("--seed", type=int, metavar="N", help="smoothgrad")
    options.add_argument("--window", type=positive, nargs="+", metavar="SIZE", help="occlusion")
    options.add_argument("--stride", type=positive, nargs="+", metavar="SIZE", help="occlusion")
    options.add_argument(
        "--no-upsample", dest="upsample", action="store_false", default=None, help="gradcam: keep the layer's own size"
    )
    options.add_argument("--pool", metavar="NAME", help="attention-rollout: mean, cls or last")
    options.add_argument("--residual", type=float, metavar="SHARE", help="attention-rollout")
    add_server_arguments(parser)
    parser.set_defaults(timeout=_TIMEOUT)


def run(arguments: argparse.Namespace) -> int:
    """Explain all inputs in one request; print, save or draw the attributions."""
    given: dict[str, Any] = {name: getattr(arguments, name) for name in _OPTIONS}
    with connect(arguments) as client:
        metadata = client.metadata(arguments.model, version=arguments.version)
        sources = chosen_inputs(arguments, metadata)
        batch = prepare(sources, metadata)
        targets = _indices(arguments.target, metadata)
        options: Any = {name: value for name, value in given.items() if value is not None}
        found = client.explain(arguments.model, batch, arguments.method, targets, version=arguments.version, **options)
    names = row_names(sources, len(batch))
    # A rollout says what a layer draws on, whatever the answer.
    explained = [] if arguments.method == "attention-rollout" else [_label(t, metadata) for t in found.targets]
    if arguments.output is not None:
        save_arrays(_arrays(found), arguments.output)
    if arguments.plot is not None:
        from layercast.client.drawing import canvas, explanations

        titles = [f"{name}: {label}" for name, label in zip(names, explained, strict=True)] if explained else names
        canvas.save(explanations.figure(batch, found.attributions, titles, metadata.preprocessing), arguments.plot)
    if arguments.json:
        print_json(_document(arguments, names, found, explained))
    else:
        _print(arguments, names, found, explained)
    return 0


def _indices(given: Sequence[str] | None, metadata: ModelMetadata) -> list[int] | None:
    """Class indices; what is no number is a label."""
    if given is None:
        return None
    indices = []
    for text in given:
        if text.removeprefix("-").isdecimal():
            indices.append(int(text))
        elif text in metadata.labels:
            indices.append(metadata.labels.index(text))
        else:
            known = ", ".join(metadata.labels[:20]) or "none; give an index"
            raise InputError(f"model {metadata.name!r} has no label {text!r}; it has {known}")
    return indices


def _label(target: int, metadata: ModelMetadata) -> str:
    return metadata.labels[target] if 0 <= target < len(metadata.labels) else f"class {target}"


def _arrays(found: Explanation) -> dict[str, Any]:
    arrays = {"attributions": found.attributions, "targets": found.targets}
    return arrays if found.delta is None else {**arrays, "delta": found.delta}


def _document(
    arguments: argparse.Namespace, names: Sequence[str], found: Explanation, labels: Sequence[str]
) -> dict[str, Any]:
    rows = []
    for place, name in enumerate(names):
        row = {"input": name, "target": int(found.targets[place])}
        row |= {"label": labels[place]} if labels else {}
        row |= {"delta": float(found.delta[place])} if found.delta is not None else {}
        rows.append({**row, "attributions": found.attributions[place].tolist()})
    timing = {"queue": found.timing.queue, "compute": found.timing.compute}
    return {
        "model": arguments.model,
        "version": found.version,
        "method": arguments.method,
        "explanations": rows,
        "seconds": timing,
        "warning": found.warning,
    }


def _print(arguments: argparse.Namespace, names: Sequence[str], found: Explanation, labels: Sequence[str]) -> None:
    """A line for each row, or what was written."""
    written = [str(path) for path in (arguments.output, arguments.plot) if path is not None]
    if written:
        print(
            f"{arguments.method} of {len(names)} rows, {shape_text(found.attributions.shape)}, in {', '.join(written)}"
        )
    else:
        heads = ["input", *(["explained"] if labels else []), "lowest", "highest", "sum"]
        heads += ["delta"] if found.delta is not None else []
        print_table(heads, [_cells(place, names, found, labels) for place in range(len(names))])
    if found.warning:
        print(f"layercast: {found.warning}", file=sys.stderr)


def _cells(place: int, names: Sequence[str], found: Explanation, labels: Sequence[str]) -> list[str]:
    values = np.asarray(found.attributions[place], np.float64)
    numbers = [float(values.min()), float(values.max()), float(values.sum())]
    numbers += [float(found.delta[place])] if found.delta is not None else []
    return [names[place], *([labels[place]] if labels else []), *(f"{number:.4g}" for number in numbers)]
