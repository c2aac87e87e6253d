"""What the verbs share: arguments about the server and the input, tables, samples."""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from layercast.client.client import Client
from layercast.client.connection import DEFAULT_TIMEOUT, DEFAULT_URL
from layercast.client.errors import InputError
from layercast.client.preprocess import Source
from layercast.client.types import ModelMetadata

SAMPLES = Path(__file__).parent.parent / "samples"
PICTURE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp")


def add_server_arguments(parser: argparse.ArgumentParser) -> None:
    """`--url`, `--timeout`, `--json`, and what a server that is not open to everyone wants."""
    url = os.environ.get("LAYERCAST_URL", DEFAULT_URL)
    parser.add_argument("--url", default=url, metavar="HOST:PORT", help="the server (LAYERCAST_URL; %(default)s)")
    parser.add_argument(
        "--timeout", type=seconds, default=DEFAULT_TIMEOUT, metavar="SECONDS", help="give up after (%(default)g)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--tls", action="store_true", help="encrypt; the server's certificate must be trusted here")
    parser.add_argument("--ca", metavar="FILE", help="encrypt; trust the authority in this PEM file")
    parser.add_argument("--certificate", metavar="FILE", help="PEM file that shows who calls (with --key)")
    parser.add_argument("--key", metavar="FILE", help="PEM file with the key of --certificate")
    parser.add_argument(
        "--token-file", metavar="FILE", help="file with the token to send (else the variable LAYERCAST_TOKEN)"
    )


def add_input_arguments(parser: argparse.ArgumentParser) -> None:
    """The model and what to send to it."""
    parser.add_argument("model", help="name of the model")
    parser.add_argument(
        "inputs",
        nargs="*",
        metavar="INPUT",
        help="a picture or .npy file, or the text itself for a text model; - reads standard input",
    )
    parser.add_argument("--version", default="", metavar="N", help="version of the model (the newest)")
    parser.add_argument("--demo", action="store_true", help="send a sample that comes with Layercast")


def connect(arguments: argparse.Namespace) -> Client:
    """A client for the server that the arguments name."""
    try:
        token = Path(arguments.token_file).read_text("utf-8").strip() if arguments.token_file else None
        return Client(
            arguments.url,
            timeout=arguments.timeout,
            tls=arguments.tls,
            ca=arguments.ca,
            certificate=arguments.certificate,
            key=arguments.key,
            token=token,
        )
    except ValueError as error:
        raise InputError(str(error)) from error


def chosen_inputs(arguments: argparse.Namespace, metadata: ModelMetadata) -> list[str]:
    """The inputs given, or the samples that suit the model."""
    if arguments.inputs and arguments.demo:
        raise InputError("--demo brings its own input; leave out either --demo or the inputs")
    if arguments.inputs:
        inputs: list[str] = arguments.inputs
        return inputs
    if not arguments.demo:
        raise InputError(f"nothing to send to model {metadata.name!r}: name an input, or pass --demo for a sample")
    return samples(metadata)


def samples(metadata: ModelMetadata) -> list[str]:
    """Packaged inputs for a model, by its preprocessing: digits, a picture, or messages."""
    preprocessing = metadata.preprocessing or {}
    match preprocessing.get("kind"), preprocessing.get("mode"):
        case "image", "L":
            return [str(path) for path in sorted(SAMPLES.glob("digit-*.png"))]
        case "image", "RGB":
            return [str(path) for path in sorted(SAMPLES.glob("picture-*.png"))]
        case "text", _:
            return (SAMPLES / "messages.txt").read_text("utf-8").splitlines()
    raise InputError(f"there is no sample for model {metadata.name!r}; name an input")


def row_names(sources: Sequence[Source], rows: int) -> list[str]:
    """What to call each row of the answer. An array file or standard input may stand for several rows."""
    if len(sources) == rows:
        return [_shown(str(source)) for source in sources]
    return [f"row {row}" for row in range(rows)]


def print_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Left-aligned columns. Text from the server is made harmless to a terminal."""
    lines = [tuple(heads), *(tuple(_printable(cell) for cell in row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def print_json(value: Any) -> None:
    """The value as indented JSON; bytes as text."""
    print(json.dumps(value, indent=2, ensure_ascii=False, default=lambda content: content.decode("utf-8", "replace")))


def shape_text(shape: Sequence[int]) -> str:
    """`[N, 3, 32]`, with N for the batch and * for other sizes that depend on the input."""
    texts = [str(size) if size >= 0 else "N" if axis == 0 else "*" for axis, size in enumerate(shape)]
    return f"[{', '.join(texts)}]"


def positive(text: str) -> int:
    """Argument type: a whole number from 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def picture_path(text: str) -> Path:
    """Argument type: where to write a picture, in a format that the ending names."""
    path = Path(text)
    if path.suffix.lower() not in PICTURE_ENDINGS:
        raise argparse.ArgumentTypeError(f"{text} ends in none of {', '.join(PICTURE_ENDINGS)}")
    return path


def seconds(text: str) -> float:
    """Argument type: a time from just above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number of seconds")
    return value


def _shown(source: str) -> str:
    path = Path(source)
    name = path.name if path.suffix and path.parent != Path() else source
    return name if len(name) <= 40 else f"{name[:37]}..."


def _printable(text: str) -> str:
    return text if text.isprintable() else repr(text)[1:-1]
