"""Taking a port, the same way and with the same words for every front end."""

import socket

from layercast.server.errors import StartError


def bound_socket(what: str, host: str, port: int, option: str) -> socket.socket:
    """Return a socket bound to `host:port` (0 for a free one); StartError names `what`, the port and its `option`."""
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    # Only a socket in TIME_WAIT may be taken over by this; a listening one stays in use.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise StartError(port_in_use(what, host, port, option)) from error
    return sock


def port_in_use(what: str, host: str, port: int, option: str) -> str:
    """Return the one line that a taken port gives."""
    return (
        f"{what} port {port} on {host} is in use, by another server perhaps; "
        f"stop that one or choose another port with {option}"
    )
