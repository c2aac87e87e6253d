"""Names of layers, and the patterns that select them. Needs no torch.

A name is a dotted module path, then `#k` where the module is called several times, then `[key]` for each level of a
tuple or dict that it returns: `blocks.0.attn`, `shared#1`, `encoder[0]`, `encoder#1[state][0]`.
"""

import difflib
import fnmatch
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

_NAME = re.compile(r"^(?P<path>[^#\[\]]*)(?:#(?P<call>\d+))?(?P<part>(?:\[[^\[\]]*\])*)$")


@dataclass(frozen=True)
class LayerName:
    """One tensor of one call: module path, call number from 0 and the part of its output ("" for a plain tensor)."""

    path: str
    call: int
    part: str

    @classmethod
    def parse(cls, name: str) -> Self:
        """Read a name as `text` writes it."""
        found = _NAME.match(name)
        if found is None:
            raise ValueError(f"{name!r} is not the name of a layer; want path, path#call or path[part]")
        return cls(found["path"], int(found["call"] or 0), found["part"])

    def text(self, repeated: bool) -> str:
        """Return the name; `repeated` says that the module is called more than once."""
        return f"{self.path}#{self.call}{self.part}" if repeated else f"{self.path}{self.part}"


class Pattern:
    """A glob over layer names: `*` stands for any characters, dots too, and `?` for one. Brackets mean themselves.

    A pattern that matches the bare path of a module selects every call and every part of what it returns.
    """

    def __init__(self, text: str) -> None:
        if not text:
            raise ValueError("a layer pattern must not be empty; '*' selects every layer")
        self.text = text
        self._whole = _compile(text)
        self._module = _compile(re.split(r"[#\[]", text, maxsplit=1)[0])

    def may_select(self, path: str) -> bool:
        """Return whether some call or part of the module at `path` could be selected."""
        return bool(self._whole.match(path) or self._module.match(path))

    def selects(self, name: LayerName, repeated: bool) -> bool:
        """Return whether the tensor `name` of a module, called more than once if `repeated`, is selected."""
        forms = {name.path, f"{name.path}{name.part}"}
        if repeated:
            forms |= {f"{name.path}#{name.call}", name.text(repeated)}
        return any(self._whole.match(form) for form in forms)


def match_layers(pattern: str, names: Iterable[str]) -> list[str]:
    """Return those of `names` (as a layer index writes them) that `pattern` selects, in their order."""
    wanted = Pattern(pattern)
    return [name for name in names if wanted.selects(LayerName.parse(name), repeated="#" in name)]


def nearest(pattern: str, names: Iterable[str]) -> str:
    """Return a hint like "; nearest: a, b" for a pattern that selected nothing, or "" where nothing is near."""
    close = difflib.get_close_matches(pattern, list(names), n=3, cutoff=0.5)
    return f"; nearest: {', '.join(close)}" if close else ""


def _compile(glob: str) -> re.Pattern[str]:
    # fnmatch's translation matches in one pass; joining ".*" by hand would try every split of a name between stars.
    return re.compile(fnmatch.translate(glob.replace("[", "[[]")))
