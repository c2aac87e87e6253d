"""`layercast serve`: start the server."""

import argparse
import contextlib
import sys
from typing import TYPE_CHECKING, Any, NoReturn, get_args, get_origin

if TYPE_CHECKING:
    from layercast.server.settings import Settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare an option a setting, with the setting's own help. What is not given falls through to the environment."""
    from layercast.server.settings import Settings

    for name, field in Settings.model_fields.items():
        option = "--" + name.replace("_", "-")
        shown = "" if field.default_factory or field.default is None else f" (default: {field.default})"
        text = f"{field.description}{shown}"
        if field.annotation is bool:
            parser.add_argument(option, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
        elif get_origin(field.annotation) is tuple:
            parser.add_argument(option, action="append", default=argparse.SUPPRESS, help=field.description, metavar="X")
        else:
            choices = [value for value in get_args(field.annotation) if isinstance(value, str)] or None
            # A setting may say what its option means when it is given without a value.
            extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
            bare: dict[str, Any] = {"nargs": "?", "const": extra["bare"]} if "bare" in extra else {}
            parser.add_argument(
                option, default=argparse.SUPPRESS, choices=choices, help=text, metavar=None if choices else "X", **bare
            )


def run(args: argparse.Namespace) -> int:
    """Serve until stopped, which ends the process; 1 when the server can't start."""
    from layercast.server import compiled, environment, logs
    from layercast.server.errors import StartError
    from layercast.server.settings import Settings, read

    given: dict[str, Any] = {name: getattr(args, name) for name in Settings.model_fields if hasattr(args, name)}
    try:
        settings = read(given)
        logs.configure(settings.log_format)
        if fault := environment.protobuf_fault() or environment.onnxruntime_clash():
            raise StartError(fault)
        environment.let_idle_threads_sleep()
        if settings.front_end == "envoy":
            from layercast.server.transport.envoy.process import become_envoy

            become_envoy(settings, given)  # does not come back: inside Envoy the sources run
        compiled.use(settings.compiled)
        _run(settings)
    except StartError as error:
        print(f"layercast serve: {error}", file=sys.stderr)
        return 1


def _run(settings: "Settings") -> NoReturn:
    import asyncio
    from collections.abc import Callable

    from layercast.server.lifecycle import run as serve

    factory: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop
    with contextlib.suppress(ImportError):  # uvloop is not to be had everywhere
        import uvloop

        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(serve(settings))
