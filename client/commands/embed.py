"""`layercast embed MODEL DIRECTORY --layer LAYER --output FILE`: a layer's values for every file of a directory."""

import argparse
import shlex
import sys
from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import Any

from layercast.client.client import Client
from layercast.client.commands.common import add_server_arguments, connect, positive, print_json, seconds
from layercast.client.embedding import writing
from layercast.client.embedding.asking import Asker
from layercast.client.embedding.job import Unreadable, collect
from layercast.client.embedding.listing import Listing, endings, listing
from layercast.client.embedding.parts import Parts
from layercast.client.errors import InputError
from layercast.client.progress import Progress
from layercast.client.types import ModelMetadata

_TIMEOUT = 60.0
_MOST_ROWS = 32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("model", help="name of the model")
    parser.add_argument("directory", type=Path, metavar="DIRECTORY", help="pictures, .npy files or texts, at any depth")
    parser.add_argument(
        "--layer", required=True, metavar="LAYER[@REDUCER]", help="one layer, 'layer2@mean' for example"
    )
    parser.add_argument(
        "--output", required=True, type=_output, metavar="FILE", help="FILE.npz, or FILE.parquet (needs pyarrow)"
    )
    parser.add_argument("--version", default="", metavar="N", help="version of the model (the newest)")
    parser.add_argument("--restart", action="store_true", help="forget the parts of an earlier run")
    parser.add_argument("--rows", type=positive, metavar="N", help=f"files a request (at most {_MOST_ROWS})")
    parser.add_argument("--in-flight", type=positive, default=8, metavar="N", help="requests at once (%(default)s)")
    parser.add_argument(
        "--patience",
        type=seconds,
        default=120.0,
        metavar="SECONDS",
        help="how long to go on asking a server that does not answer (%(default)g)",
    )
    add_server_arguments(parser)
    parser.set_defaults(timeout=_TIMEOUT)


def run(arguments: argparse.Namespace) -> int:
    """Ask for what is missing, write the output, list what could not be read; 1 if there is such a file."""
    if not arguments.directory.is_dir():
        raise InputError(f"{arguments.directory} is no directory; `layercast features` takes single files")
    if arguments.output.suffix == ".parquet":
        import_module("pyarrow")  # now, not after hours of work
    with connect(arguments) as client:
        version, metadata = _pinned(client, arguments.model, arguments.version)
        wanted = endings(metadata)
        found = listing(arguments.directory, wanted)
        if not found.entries:
            raise InputError(f"{arguments.directory} holds no {', '.join(wanted)}{_left_out(found.left_out)}")
        return _embed(arguments, client, metadata, version, found)


def _pinned(client: Client, model: str, version: str) -> tuple[str, ModelMetadata]:
    """The version that answers all requests, whatever is deployed meanwhile, and what it takes."""
    if not version:
        numbers = [int(number) for number in client.metadata(model).versions if number.isdecimal()]
        version = str(max(numbers)) if numbers else ""
    return version, client.metadata(model, version=version)


def _embed(arguments: argparse.Namespace, client: Client, metadata: ModelMetadata, version: str, found: Listing) -> int:
    output: Path = arguments.output
    about = {"model": metadata.name, "version": version, "layer": arguments.layer}
    job = {**about, "preprocessing": dict(metadata.preprocessing or {})}
    folder = output.with_name(f"{output.name}.parts")
    asker = Asker(client, metadata, version, arguments.layer, arguments.directory, arguments.patience)
    with Parts.opened(folder, job, arguments.restart) as parts:
        known = sum(entry in parts for entry in found.entries)
        try:
            with Progress(len(found.entries), known) as progress:
                rows = arguments.rows or _rows(metadata)
                unreadable = collect(asker, parts, found.entries, rows, arguments.in_flight, output, progress)
        except KeyboardInterrupt:
            done = sum(entry in parts for entry in found.entries)
            command = f"{done:,} of {len(found.entries):,} files are done; the same command goes on from there"
            print(f"layercast: stopped: {command}", file=sys.stderr)
            raise
        here = [entry for entry in found.entries if entry in parts]
        if here and parts.form is not None:
            writing.write(output, parts.groups(here), [entry.path for entry in here], parts.form, about)
        # Kept for the run after the files are mended, which then asks for nothing else.
        if not unreadable:
            parts.remove()
        shape = [len(here), *(parts.form.shape if parts.form else ())]
        _report(arguments, about, shape, unreadable, found.left_out)
    return 1 if unreadable else 0


def _rows(metadata: ModelMetadata) -> int:
    limit = metadata.properties.get("max_batch", "")
    return min(int(limit), _MOST_ROWS) if limit.isdecimal() and int(limit) > 0 else _MOST_ROWS


def _report(
    arguments: argparse.Namespace, about: dict[str, str], shape: list[int], unreadable: Unreadable, left: Counter[str]
) -> None:
    if arguments.json:
        failed = [{"path": path, "reason": reason} for path, reason in unreadable]
        document: dict[str, Any] = {**about, "output": str(arguments.output), "shape": shape}
        print_json({**document, "unreadable": failed, "left_out": dict(sorted(left.items()))})
    elif shape[0]:
        print(f"{shape[0]:,} rows of {arguments.layer}, {shape}, in {arguments.output}{_left_out(left)}")
    if unreadable:
        what = f"without {len(unreadable):,} files that can't be read" if shape[0] else "no file can be read"
        print(f"layercast: {what}; mend or remove them and run the same command:", file=sys.stderr)
        for path, reason in unreadable:
            print(f"  {shlex.quote(path)}: {reason}", file=sys.stderr)


def _left_out(left: Counter[str]) -> str:
    """How many files are no input of the model, by ending."""
    if not left:
        return ""
    return f" (left out: {', '.join(f'{count:,} {ending}' for ending, count in sorted(left.items()))})"


def _output(text: str) -> Path:
    path = Path(text)
    if path.suffix not in writing.FORMATS:
        raise argparse.ArgumentTypeError(f"{text} ends in neither {' nor '.join(writing.FORMATS)}")
    return path
