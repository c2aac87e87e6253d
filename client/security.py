"""What a client shows to a server and asks of it: certificates for TLS, a token for its calls."""

import os
from pathlib import Path

import grpc

File = str | os.PathLike[str]

TOKEN_VARIABLE = "LAYERCAST_TOKEN"


def channel_credentials(
    tls: bool, ca: File | None, certificate: File | None, key: File | None
) -> grpc.ChannelCredentials | None:
    """Return credentials for an encrypted connection, or None for a plain one.

    `ca` is a PEM file with the authority that vouches for the server; without it those that the system trusts do.
    `certificate` and `key` are for servers that want to know their callers. Any of the three means TLS. Raises
    ValueError for one without the other, OSError for a file that can't be read.
    """
    if (certificate is None) != (key is None):
        raise ValueError("certificate and key go together; one of them is missing")
    if not (tls or ca or certificate):
        return None
    pem = [Path(path).read_bytes() if path is not None else None for path in (ca, key, certificate)]
    return grpc.ssl_channel_credentials(*pem)


def authorization(token: str | None) -> dict[str, str]:
    """Return the header that carries `token`, or the one in the environment variable LAYERCAST_TOKEN, if any."""
    token = os.environ.get(TOKEN_VARIABLE) if token is None else token
    if not token:
        return {}
    if not (token.isascii() and token.isprintable()) or " " in token:
        raise ValueError("the token has characters that no token has: blanks, line ends, or others than ASCII")
    return {"authorization": f"Bearer {token}"}
