"""Taking a port, the same way and with the same words for every front end."""

import errno
import socket
from typing import Final

from layercast.server.errors import StartError

BACKLOG: Final = 1024


def bound_socket(what: str, host: str, port: int, option: str) -> socket.socket:
    """Return a socket bound to `host:port` (0 for a free one); StartError names `what`, the port and its `option`."""
    sock = None
    try:
        sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
        # Only a socket in TIME_WAIT may be taken over by this; a listening one stays in use.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
    except (OSError, UnicodeError) as error:
        if sock:
            sock.close()
        raise StartError(not_bound(error, what, host, port, option)) from error
    return sock


def listening_socket(what: str, host: str, port: int, option: str) -> socket.socket:
    """Return such a socket on which callers wait to be accepted."""
    sock = bound_socket(what, host, port, option)
    try:
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise StartError(not_bound(error, what, host, port, option)) from error
    return sock


def not_bound(error: Exception, what: str, host: str, port: int, option: str) -> str:
    """Return the one line that a port gives which can't be taken: why, and what to do."""
    number = error.errno if isinstance(error, OSError) else None
    place = f"{what} port {port} on {host}"
    if isinstance(error, socket.gaierror | UnicodeError):
        return f"the host {host!r} is not known; give an address or a name of this machine with --host"
    if number == errno.EADDRINUSE:
        return f"{place} is in use, by another server perhaps; stop that one or choose another port with {option}"
    if number in (errno.EACCES, errno.EPERM):
        return f"{place} may not be taken by this user (below 1024 it takes rights); choose another with {option}"
    if number in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
        return f"{host} is not an address of this machine; give one with --host, or 0.0.0.0 for every interface"
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return f"{place} can't be taken: {reason} ({option}, --host)"
