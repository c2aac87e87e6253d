"""Whose Python code may run because an artefact names it."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Self

ARTEFACT_CODE: Final = "artefact-code"
"""The entry that lets source files kept in artefacts run."""

_DOTTED: Final = r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*"
_ENTRY: Final = re.compile(rf"^{_DOTTED}(?::{_DOTTED})?\Z")


@dataclass(frozen=True)
class Trust:
    """What may be imported and called. Nothing by default; layercast's own architectures need no entry.

    An entry is a package or module (`timm`: it and everything below it), one factory of a module
    (`timm:create_model`), or `artefact-code`.
    """

    entries: frozenset[str] = frozenset()

    @classmethod
    def of(cls, entries: Iterable[str]) -> Self:
        """Return the trust in `entries`; ValueError for one that is none of the three kinds."""
        given = frozenset(entries)
        for entry in sorted(given):
            if entry != ARTEFACT_CODE and not _ENTRY.match(entry):
                raise ValueError(
                    f"{entry!r} is no package (timm), no factory (timm:create_model) and not {ARTEFACT_CODE}"
                )
        return cls(given)

    @classmethod
    def naming(cls, architecture: str, is_file: bool) -> Self:
        """Return the trust of somebody who names `architecture`, or gives its file, and so means it to run."""
        return cls.of([ARTEFACT_CODE if is_file else architecture])

    def refusal(self, architecture: str, is_file: bool) -> str:
        """Return why the code of `architecture` may not run, with the fix; "" when it may."""
        if is_file:
            if ARTEFACT_CODE in self.entries:
                return ""
            return f"its code, a file in the artefact, is not trusted; start the server with --trust {ARTEFACT_CODE}"
        if architecture in self.entries or self.trusts_module(architecture.partition(":")[0]):
            return ""
        return f"its code, {architecture}, is not trusted; start the server with --trust {architecture}"

    def trusts_module(self, name: str) -> bool:
        """Tell whether the module `name`, or a package that holds it, is an entry."""
        parts = name.split(".")
        return any(".".join(parts[:end]) in self.entries for end in range(1, len(parts) + 1))
