"""Bearer tokens from a file, and what each of them allows."""

import hashlib
import hmac
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from layercast.server.errors import StartError, Unauthenticated
from layercast.server.service.scopes import METADATA, SCOPES

MIN_LENGTH: Final = 16
_SCHEME: Final = "bearer "
_LAYOUT: Final = 'want tables [[tokens]] with name = "...", token = "..." and scopes = ["predict"]'


@dataclass(frozen=True)
class _Token:
    digest: bytes
    scopes: frozenset[str]


class Tokens:
    """The tokens that a server accepts. Only their digests are kept, so none can end up in a log or a dump."""

    def __init__(self, tokens: Sequence[_Token]) -> None:
        self._tokens = tokens

    def scopes(self, authorization: str | None) -> frozenset[str]:
        """Return what the header `authorization: Bearer TOKEN` allows; Unauthenticated for a missing or unknown token.

        The time that takes says nothing about the tokens: digests of one length are compared, and always all of them.
        """
        if authorization is None:
            raise Unauthenticated("this server wants a token; send it as `authorization: Bearer TOKEN`")
        if not authorization.lower().startswith(_SCHEME):
            raise Unauthenticated("the authorization header is not of the form `Bearer TOKEN`")
        digest = _digest(authorization[len(_SCHEME) :].strip())
        found = [token for token in self._tokens if hmac.compare_digest(token.digest, digest)]
        if not found:
            raise Unauthenticated("this server does not know the token")
        return found[0].scopes


def read_tokens(path: Path) -> Tokens:
    """Return the tokens in a TOML file; StartError, which never shows a token, when there is something wrong in it."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StartError(f"token_file: can't read {str(path)!r}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise StartError(f"token_file: {str(path)!r} is not UTF-8 text") from error
    except tomllib.TOMLDecodeError as error:
        # Its text may quote the file.
        raise StartError(f"token_file: {str(path)!r} is not TOML; {_LAYOUT}") from error
    entries = document.get("tokens")
    if set(document) != {"tokens"} or not isinstance(entries, list) or not entries:
        raise StartError(f"token_file: no tokens in {str(path)!r}; {_LAYOUT}")
    tokens = [_token(entry, f"token_file: token {number}") for number, entry in enumerate(entries, 1)]
    if len({token.digest for token in tokens}) < len(tokens):
        raise StartError(f"token_file: two entries in {str(path)!r} have the same token")
    return Tokens(tokens)


def _token(entry: Any, where: str) -> _Token:
    if not isinstance(entry, dict) or set(entry) != {"name", "token", "scopes"}:
        raise StartError(f"{where}: {_LAYOUT}")
    name, token, scopes = entry["name"], entry["token"], entry["scopes"]
    if not isinstance(name, str) or not name:
        raise StartError(f"{where}: name must be a text that says whose it is")
    where = f"{where} ({name[:64]!r})"
    if not isinstance(token, str) or not (token.isascii() and token.isprintable()) or " " in token:
        raise StartError(f"{where}: a token has printable ASCII characters and no blanks")
    if len(token) < MIN_LENGTH:
        raise StartError(f"{where}: a token has at least {MIN_LENGTH} characters; `openssl rand -hex 32` makes one")
    if not isinstance(scopes, list) or not scopes or not all(scope in SCOPES for scope in scopes):
        raise StartError(f"{where}: scopes must be a list of {', '.join(SCOPES)}")
    # Whoever may call a model may also ask what it takes.
    return _Token(_digest(token), frozenset({*scopes, METADATA}))


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()
