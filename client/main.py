"""The program `layercast`: `layercast VERB ...`. Only the chosen verb's module is imported.

Exit codes: 0 done, 1 bad data or an error of the server, 2 bad arguments, 130 interrupted. Errors are one line.
"""

import argparse
import difflib
import importlib
import importlib.metadata
import os
import re
import sys
import warnings
from dataclasses import dataclass
from types import ModuleType
from typing import TextIO


@dataclass(frozen=True, slots=True)
class Command:
    """A verb: its line in `--help`, and the module with `add_arguments(parser)` and `run(args)`."""

    help: str
    module: str


# Modules by name: the client must not import server or models, and `--help` must not wait for torch.
COMMANDS: dict[str, Command] = {
    "serve": Command("serve the zoo, or a repository of your models", "layercast.server.commands.serve"),
    "predict": Command(
        "ask a server what a model says about a picture, array or text", "layercast.client.commands.predict"
    ),
    "features": Command("ask a server what layers inside a model computed", "layercast.client.commands.features"),
    "explain": Command("ask a server what in an input counts for its answer", "layercast.client.commands.explain"),
    "embed": Command(
        "write a layer's values for every file of a directory into one file", "layercast.client.commands.embed"
    ),
    "layers": Command("list the layers of a model", "layercast.client.commands.layers"),
    "models": Command("list the models of a server", "layercast.client.commands.models"),
    "models show": Command(
        "show the modules inside a model: shapes, parameters, multiply-adds", "layercast.models.commands.show"
    ),
    "train": Command("train a model of the zoo", "layercast.models.commands.train"),
    "evaluate": Command("measure a model's accuracy on its test split", "layercast.models.commands.evaluate"),
    "export": Command("write a model as an artefact that can be served", "layercast.models.commands.export"),
    "compile": Command(
        "compile what runs for every request, up to 1.8 times as many requests/s, and convolutions",
        "layercast.server.commands.compile",
    ),
    "doctor": Command("check this machine and installation", "layercast.server.commands.doctor"),
}

# Which extra brings a package; every other one comes with `server`.
EXTRAS = {"PIL": "images", "pyarrow": "parquet", "onnx": "export", "onnxscript": "export"}

BAD_DATA, BAD_ARGUMENTS, INTERRUPTED = 1, 2, 130


def main(argv: list[str] | None = None) -> int:
    """Run one verb; return the exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        return _run(arguments)
    except SystemExit as stop:
        # argparse: 0 after --help, 2 after an error that it has printed.
        return stop.code if isinstance(stop.code, int) else BAD_DATA
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of a pipe (head, for example) has gone; without this the interpreter complains while it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BAD_DATA


def _run(arguments: list[str]) -> int:
    verb, rest = _split(arguments)
    if verb not in COMMANDS:
        return _without_verb(verb)
    command = COMMANDS[verb]
    # Late, like every verb: `--help` needs neither grpc nor numpy.
    from layercast.client.errors import InputWarning, LayercastError

    try:
        module = importlib.import_module(command.module)
        parser = argparse.ArgumentParser(prog=f"layercast {verb}", description=_description(module))
        module.add_arguments(parser)
        given = _parse(parser, rest)
        with warnings.catch_warnings():
            warnings.simplefilter("always", InputWarning)
            warnings.showwarning = _show_warning
            code: int = module.run(given)
        sys.stdout.flush()
        return code
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package == "layercast":
            raise
        return _fail(f"{verb} needs {package}: pip install 'layercast[{EXTRAS.get(package, 'server')}]'")
    except BrokenPipeError:
        raise
    except (LayercastError, ValueError, OSError) as error:
        if os.environ.get("LAYERCAST_TRACEBACK"):
            raise
        return _fail(str(error) or type(error).__name__)


def _split(arguments: list[str]) -> tuple[str, list[str]]:
    """The verb, which may be two words, and what follows it."""
    if not arguments:
        return "--help", []
    verb = arguments[0]
    further = [name for name in COMMANDS if name.startswith(f"{verb} ")]
    if further and len(arguments) > 1 and not arguments[1].startswith("-"):
        return f"{verb} {arguments[1]}", arguments[2:]
    return verb, arguments[1:]


def _parse(parser: argparse.ArgumentParser, arguments: list[str]) -> argparse.Namespace:
    """Parse all of `arguments`; an unknown option is told with the nearest one."""
    found, unknown = parser.parse_known_args(arguments)
    if unknown:
        options = re.findall(r"--[a-z][a-z-]*", parser.format_usage())
        near = difflib.get_close_matches(unknown[0].partition("=")[0], options, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    return found


def _without_verb(word: str) -> int:
    if word in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        print("usage: layercast VERB ...\n\nServe PyTorch models over gRPC: predictions, and any layer inside them.\n")
        for verb, command in COMMANDS.items():
            print(f"  {verb.ljust(width)}  {command.help}")
        print("\n`layercast VERB --help` explains one; --version prints the version.")
        return 0
    if word == "--version":
        print(f"layercast {importlib.metadata.version('layercast')}")
        return 0
    near = difflib.get_close_matches(word, COMMANDS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}"
    print(f"layercast: no verb {word!r}; {hint}", file=sys.stderr)
    return BAD_ARGUMENTS


def _description(module: ModuleType) -> str:
    """The part of the module's first line after the verb's signature."""
    first = (module.__doc__ or "").strip().partition("\n")[0]
    text = first.partition(": ")[2] or first
    return text[:1].upper() + text[1:]


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    print(f"layercast: {category.__name__}:", " ".join(str(message).split()), file=sys.stderr)


def _fail(message: str) -> int:
    print("layercast:", " ".join(message.split()), file=sys.stderr)
    return BAD_DATA


if __name__ == "__main__":
    sys.exit(main())
