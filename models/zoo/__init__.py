"""The zoo: trained models that come with layercast, one folder each, and their export into a cache.

Needs no torch: exports run in a process of their own, so that a server never loads the exporters.
"""

import difflib
import hashlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Final

from layercast.models.card import CARD_FILE
from layercast.models.manifest import MANIFEST_FILE, WEIGHTS_FILE
from layercast.models.versions import tool_versions

ZOO: Final = Path(__file__).parent
VERSION: Final = 1
"""The version that models of the zoo are exported as."""

_NOT_EXPORTED: Final = (
    "data",
    "explain",
    "foreign",
    "training",
    "torch_files.py",
    "losses.py",
    "loss_targets.py",
    "summary.py",
    "lookup.py",
    "attention_maps.py",
    "projection.py",
    "initialise.py",
)
"""Sources under models/ that an artefact does not depend on."""

_KEPT_LINES: Final = 5


class ZooError(Exception):
    """The zoo cannot be served from its cache; the text is one line with the cause and what to do."""


def names(zoo: Path = ZOO) -> list[str]:
    """Return the names of the models in the zoo, sorted."""
    return sorted(card.parent.name for card in zoo.glob(f"*/{CARD_FILE}"))


_names = names  # `ensure_exported` has an argument of that name


def directory(name: str, zoo: Path = ZOO) -> Path:
    """Return the folder of the model called `name`; ValueError with the nearest names when there is none."""
    known = names(zoo)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3) or known
        raise ValueError(f"no model {name!r} in the zoo; nearest: {', '.join(near)}")
    return zoo / name


def ensure_exported(
    cache: Path | str,
    names: Sequence[str] | None = None,
    report: Callable[[str], None] = lambda line: None,
    zoo: Path = ZOO,
) -> Path:
    """Return a repository below `cache` that holds every model of the zoo (or of `names`), exporting what is missing.

    The repository's name is a digest of weights, cards, sources and tool versions, so that a stale export is never
    used. Processes that start at once may each export; the first to finish a model wins. `report` is told each line.
    ZooError when the cache cannot be written or a model cannot be exported.
    """
    known = _names(zoo)
    folders = [directory(name, zoo) for name in (known if names is None else names)]
    repository = Path(cache).expanduser().absolute() / f"zoo-{_key([zoo / name for name in known])}"
    missing = [folder.name for folder in folders if not _is_exported(repository, folder.name)]
    if missing:
        _check_writable(repository)
        report(f"exporting {', '.join(missing)} into {repository} (once; seconds each)")
        last = _export(missing, repository, zoo, report)
        absent = [name for name in missing if not _is_exported(repository, name)]
        if absent:
            raise ZooError(f"could not export {', '.join(absent)}: {' | '.join(last) or 'no output'}")
    return repository


def _is_exported(repository: Path, name: str) -> bool:
    return (repository / name / str(VERSION) / MANIFEST_FILE).is_file()


def _check_writable(repository: Path) -> None:
    try:
        repository.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=repository):
            pass
    except OSError as error:
        raise ZooError(
            f"the export cache {repository.parent} cannot be written: {error.strerror or error}; choose another folder"
        ) from error


def _export(missing: Sequence[str], repository: Path, zoo: Path, report: Callable[[str], None]) -> list[str]:
    """Export in a child process, report its lines, and return the last of them."""
    command = [sys.executable, "-m", "layercast.models.commands.export", *missing, "--output", str(repository)]
    command += ["--version", str(VERSION), "--zoo", str(zoo), "--keep"]
    command.append("--until-stdin-ends")  # a server that is stopped or killed meanwhile leaves no child behind
    last: list[str] = []
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as child:
        try:
            assert child.stdout is not None
            for line in map(str.rstrip, child.stdout):
                report(line)
                last = [*last, line][-_KEPT_LINES:]
            child.wait()
        finally:
            child.kill()
    return last


def _key(folders: Iterable[Path]) -> str:
    """Return a digest of everything that shapes the artefacts of the models in `folders`."""
    digest = hashlib.sha256()
    for tool, version in tool_versions().items():
        digest.update(f"{tool} {version}\n".encode())
    for path in (*_sources(), *(folder / file for folder in folders for file in (CARD_FILE, WEIGHTS_FILE))):
        content = path.read_bytes() if path.is_file() else b""
        digest.update(f"{path.parent.name}/{path.name} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()[:16]


def _sources() -> list[Path]:
    root = ZOO.parent
    files = root.rglob("*.py")
    return sorted(path for path in files if path.relative_to(root).parts[0] not in _NOT_EXPORTED)
