"""Documentation pages as data: their code blocks with what the comments above say, their links, their tables."""

import re
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
RUN = ("python", "sh", "console")

_FENCE = re.compile(r"^( *)``` *(\S*) *$")
_COMMENT = re.compile(r"<!-- *(.*?) *-->\s*$")
_DIRECTIVE = re.compile(r"^(not run|file|until):? *(.*)$")
_SERVER = re.compile(r"^server(?:: *(.+))?$")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


@dataclass
class Block:
    """A fenced block: its language, its text, the line that the text begins on, and what the comment above it says."""

    language: str
    text: str
    line: int
    directive: str = ""
    argument: str = ""
    expected: str | None = None
    """The `text` block that directly follows, if any."""


@dataclass
class Page:
    """A page: its blocks, and whether it asks for a server."""

    path: Path
    blocks: list[Block] = field(default_factory=list)
    needs_server: bool = False
    settings: str = ""
    """TOML with settings of the server, where the page wants one of its own."""

    @property
    def needs_tritonclient(self) -> bool:
        """Whether a block runs in the environment of the stock client."""
        return any(is_stock(block) for block in self.blocks)


def is_stock(block: Block) -> bool:
    """Return whether a block is for the stock client's own environment."""
    return block.language == "python" and "import tritonclient" in block.text and block.directive != "not run"


def parse(path: Path) -> Page:
    """Read a page. An AssertionError names the line of a comment or a block that the conventions do not know."""
    page, lines = Page(path), path.read_text("utf-8").splitlines()
    comment, directly, position = "", False, 0
    while position < len(lines):
        line = lines[position]
        position += 1
        if found := _FENCE.match(line):
            start, indent = position, found[1]
            while position < len(lines) and lines[position].strip() != "```":
                position += 1
            text = "\n".join(text.removeprefix(indent) for text in lines[start:position]) + "\n"
            position += 1
            block = Block(found[2], text, start + 1, *_directive(path, start, comment))
            if directly and block.language == "text" and not block.directive and page.blocks[-1].expected is None:
                page.blocks[-1].expected = text
            page.blocks.append(block)
            comment, directly = "", block.language in RUN
        elif (found := _COMMENT.match(line)) and (server := _SERVER.match(found[1])):
            assert not page.blocks, f"{path.name}:{position}: <!-- server --> comes before the first block"
            page.needs_server, page.settings = True, server[1] or ""
        elif found:
            comment, directly = found[1], False
        elif line.strip():
            comment, directly = "", False
    return page


def _directive(path: Path, line: int, comment: str) -> tuple[str, str]:
    if not comment:
        return "", ""
    found = _DIRECTIVE.match(comment)
    assert found, f"{path.name}:{line}: the comment above the block is none of `not run`, `file`, `until`: {comment!r}"
    assert found[2], f"{path.name}:{line}: `{found[1]}` says no more; write <!-- {found[1]}: … -->"
    return found[1], found[2]


def broken_links(path: Path, root: Path = ROOT) -> list[str]:
    """Return the links of a page to files that are not there and to headings that nobody wrote."""
    broken = []
    for target in _LINK.findall(_prose(path)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        if not file.is_relative_to(root) or not file.exists() or (anchor and anchor not in _anchors(file)):
            broken.append(target)
    return broken


def table(path: Path, heading: str) -> list[list[str]]:
    """Return the rows of the first table below a heading, without head and rule; code marks are taken off."""
    section = _prose(path).split(f"\n{heading}\n", 1)
    assert len(section) == 2, f"{path.name} has no heading {heading!r}"
    rows = []
    for line in section[1].splitlines():
        if line.startswith("|"):
            cells = re.split(r"(?<!\\)\|", line.strip()[1:-1])
            rows.append([cell.strip().replace("`", "") for cell in cells])
        elif rows:
            break
    return rows[2:]


def _anchors(path: Path) -> set[str]:
    """Headings as GitHub names them: lower case, punctuation gone, blanks as hyphens."""
    heads = re.findall(r"^#+ +(.+?) *$", _prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def _prose(path: Path) -> str:
    """The page without its blocks."""
    return re.sub(r"^ *```.*?^ *``` *$", "", path.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
