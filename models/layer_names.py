"""Names of layers, and the patterns that select them. Needs no torch.

A name is a dotted module path, then `#k` where the module is called several times, then `[key]` for each level of a
tuple or dict that it returns: `blocks.0.attn`, `shared#1`, `encoder[0]`, `encoder#1[state][0]`.

A pattern is a glob over names, or over the names of module classes: `layer1.*`, `type:Conv2d`, `type:*Norm*`.
"""

import difflib
import fnmatch
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Protocol, Self

TYPE: Final = "type:"
"""A pattern of this prefix is over module classes."""

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


class Typed(Protocol):
    """Something that says which class its module has, as an entry of the layer index does."""

    @property
    def type(self) -> str:
        """Name of the module's class."""


Layers = Iterable[str] | Mapping[str, Typed | str]
"""Names of layers, or a mapping from them to their classes (or to what has a `type`), as `type:` patterns need."""


class Pattern:
    """A glob over layer names: `*` stands for any characters, dots too, and `?` for one. Brackets mean themselves.

    A pattern that matches the bare path of a module selects every call and every part of what it returns. `type:GLOB`
    is over the name of the module's class instead of its path, for instance `type:Conv2d` or `type:LSTM#1[0]`.
    """

    def __init__(self, text: str) -> None:
        if not text or text == TYPE:
            raise ValueError(f"a layer pattern must not be empty, got {text!r}; '*' selects every layer")
        self.text = text
        self._of_types = text.startswith(TYPE)
        glob = text.removeprefix(TYPE)
        self._whole = _compile(glob)
        self._module = _compile(re.split(r"[#\[]", glob, maxsplit=1)[0])

    def may_select(self, path: str, kind: str = "") -> bool:
        """Return whether some call or part of the module at `path`, of the class named `kind`, could be selected."""
        stem = kind if self._of_types else path
        return bool(self._whole.match(stem) or self._module.match(stem))

    def selects(self, name: LayerName, repeated: bool, kind: str = "") -> bool:
        """Return whether the tensor `name` is selected, of a module of class `kind`, called again if `repeated`."""
        stem = kind if self._of_types else name.path
        forms = {stem, f"{stem}{name.part}"}
        if repeated:
            forms |= {f"{stem}#{name.call}", f"{stem}#{name.call}{name.part}"}
        return any(self._whole.match(form) for form in forms)


def match_layers(pattern: str, layers: Layers) -> list[str]:
    """Return those of `layers` (named as a layer index does) that `pattern` selects, in their order."""
    wanted = Pattern(pattern)
    kinds = _kinds(layers)
    return [name for name, kind in kinds.items() if wanted.selects(LayerName.parse(name), "#" in name, kind)]


def nearest(pattern: str, layers: Layers) -> str:
    """Return a hint like "; nearest: a, b" for a pattern that selected nothing, or "" where nothing is near.

    The last parts of a path (`conv1` for `layer1.0.conv1`) are nearer than any other spelling.
    """
    kinds = _kinds(layers)
    if pattern.startswith(TYPE):
        known = [f"{TYPE}{kind}" for kind in dict.fromkeys(kinds.values())]
        close = difflib.get_close_matches(pattern, known, n=3, cutoff=0.6)
    else:
        ends = [name for name in kinds if name.endswith(f".{pattern}")]
        close = [*ends[:3], *difflib.get_close_matches(pattern, kinds, n=3, cutoff=0.5)]
    return f"; nearest: {', '.join(list(dict.fromkeys(close))[:3])}" if close else ""


def _kinds(layers: Layers) -> dict[str, str]:
    if not isinstance(layers, Mapping):
        return dict.fromkeys(layers, "")
    return {name: value if isinstance(value, str) else value.type for name, value in layers.items()}


def _compile(glob: str) -> re.Pattern[str]:
    # fnmatch's translation matches in one pass; joining ".*" by hand would try every split of a name between stars.
    return re.compile(fnmatch.translate(glob.replace("[", "[[]")))
