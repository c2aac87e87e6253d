"""`layercast models`: what a server has, and in which state."""

import argparse
from dataclasses import asdict

from layercast.client.commands.common import add_server_arguments, connect, print_json, print_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.epilog = "`layercast models show NAME` shows what is inside one, without a server."
    add_server_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print every model version in the server's repository."""
    with connect(arguments) as client:
        found = client.models()
    if arguments.json:
        print_json([asdict(model) for model in found])
    else:
        heads = ("model", "version", "state", "reason")
        print_table(heads, [(model.name, model.version, model.state, model.reason) for model in found])
    return 0
