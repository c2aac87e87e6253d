"""The arguments of `layercast export` for a module that is not of the zoo, and what they mean."""

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from layercast.models.commands.arguments import json_object

if TYPE_CHECKING:
    from layercast.models.foreign.export import Order

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z")
_FILE: Final = re.compile(r"(?P<path>.+\.py):(?P<factory>[A-Za-z_][\w.]*)\Z", re.DOTALL)
_PACKAGE: Final = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*\Z")
_FILE_NAME: Final = re.compile(r"[A-Za-z_]\w*\.py\Z")

_WEIGHTS_HELP: Final = (
    "state dict: .safetensors; .pt, .pth, .bin or .ckpt of tensors only; or the .index.json of shards "
    "(default: what the factory gives)"
)
_EXAMPLE_HELP: Final = (
    "one input of forward: NAME:DTYPE[SIZES]{VALUES}, such as image:float32[2,3,224,224] or "
    "tokens:int64[2,T<=128]{0..30521}. The first size is the batch. Of the others, a number is fixed; a word or ? is "
    "dynamic, and <=MAX bounds it. VALUES, if given: LOW..HIGH, LOW..HIGH pad VALUE for tokens that may be padded, or "
    "mask for zeros and ones that tell which tokens count. Once for each input"
)


class UsageFault(ValueError):
    """The command's arguments are wrong or contradict each other."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options that go with package.module:factory and --file."""
    group = parser.add_argument_group("a module that is not of the zoo")
    group.add_argument("--file", metavar="PATH:NAME", help="take the class or function NAME from a Python file")
    group.add_argument("--arguments", metavar="JSON", help="what to call it with, such as '{\"depth\": 3}'")
    group.add_argument("--weights", type=Path, metavar="FILE", help=_WEIGHTS_HELP)
    group.add_argument("--weights-key", metavar="KEY", help="which one, where the file holds several state dicts")
    group.add_argument("--example", action="append", metavar="INPUT", help=_EXAMPLE_HELP)
    group.add_argument("--name", help="name to serve it under (default: the factory's, in small letters)")
    group.add_argument("--labels", metavar="LIST", help="names of the classes: a,b,c or a file with one a line")
    group.add_argument("--description", metavar="TEXT", help="what the model does, in a sentence")


def given_options(args: argparse.Namespace) -> list[str]:
    """Return those of the options above that were given."""
    names = ("file", "arguments", "weights", "weights_key", "example", "name", "labels", "description")
    return [f"--{name.replace('_', '-')}" for name in names if getattr(args, name) is not None]


def is_asked_for(args: argparse.Namespace) -> bool:
    """Tell whether the arguments name a module rather than models of the zoo."""
    return args.file is not None or any(":" in name for name in args.names)


def order_of(args: argparse.Namespace) -> "Order":
    """Return what the arguments ask for; UsageFault when they are wrong, OSError for a file that cannot be read."""
    if len(args.names) + (args.file is not None) != 1 or args.all:
        raise UsageFault("want one package.module:factory or one --file PATH:NAME, and nothing beside it")
    if not args.example:
        raise UsageFault("describe the inputs of forward, each with one --example NAME:DTYPE[SIZES]")
    path, architecture = _architecture(args)
    # Here, not above: --help and most refusals need no torch.
    from layercast.models.foreign.export import Order, default_name
    from layercast.models.foreign.factory import Code

    name = default_name(architecture) if args.name is None else args.name
    if not _NAME.match(name):
        raise UsageFault(f"--name: want letters, digits, dot, dash and underscore, got {name!r}")
    return Order(
        architecture=architecture,
        examples=args.example,
        name=name,
        code=Code(path.name, path.read_bytes(), path) if path else None,
        arguments=_arguments(args.arguments),
        weights=args.weights,
        weights_key=args.weights_key or "",
        labels=_labels(args.labels),
        description=args.description or "",
    )


def _architecture(args: argparse.Namespace) -> tuple[Path | None, str]:
    """Return the source file, if there is one, and the architecture."""
    if args.file is None:
        if not _PACKAGE.match(args.names[0]):
            raise UsageFault(f"want package.module:factory, got {args.names[0]!r}; for a file use --file PATH:NAME")
        return None, args.names[0]
    found = _FILE.match(args.file)
    if found is None:
        raise UsageFault(f"--file: want PATH.py:NAME, as in net.py:Net, got {args.file!r}")
    path = Path(found["path"])
    if not _FILE_NAME.match(path.name):
        raise UsageFault(f"--file: the file's name must be that of a Python module, got {path.name!r}")
    return path, f"{path.name}:{found['factory']}"


def _arguments(text: str | None) -> dict[str, Any]:
    try:
        return json_object(text or "{}")
    except ValueError as error:
        raise UsageFault(f"--arguments: {error}") from None


def _labels(text: str | None) -> list[str]:
    if text is None:
        return []
    path = Path(text)
    if path.is_file():
        labels = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        while labels and not labels[-1]:
            labels.pop()
    elif path.suffix == ".txt" or "/" in text:
        raise FileNotFoundError(f"--labels: there is no file {text}")
    else:
        labels = [label.strip() for label in text.split(",")]
    if not labels or not all(labels):
        raise UsageFault("--labels: want a name for every class, got an empty one")
    return labels
