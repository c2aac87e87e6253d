"""The modules that run for every request, compiled to native code by mypyc, in the place of their sources.

Optional: `layercast compile` makes them, `layercast serve` uses them if they are there and were made of just these
sources. A folder is named after all that it was made of, so nothing stale is ever used.
"""

import hashlib
import importlib
import logging
import platform
import sys
import sysconfig
import warnings
from pathlib import Path
from typing import Final

from layercast.server import kernels

PACKAGES: Final = ("proto", "models", "client", "server")
"""What the compiler reads: it takes types and constants from every module that one of `MODULES` imports."""

MODULES: Final = (
    "proto.fields",
    "server.counting",
    "server.inline",
    "server.model",
    "server.monitor",
    "server.runner",
    "server.work",
    "server.batching.admission",
    "server.batching.batcher",
    "server.batching.endings",
    "server.batching.forwards",
    "server.batching.gather",
    "server.batching.pace",
    "server.batching.patience",
    "server.batching.policy",
    "server.batching.queue",
    "server.batching.timers",
    "server.batching.waiting",
    "server.service.answering",
    "server.service.bunch",
    "server.service.form",
    "server.service.gathering",
    "server.service.heads",
    "server.service.inference",
    "server.service.plain",
    "server.service.scopes",
    "server.service.short",
    "server.service.template",
    "server.service.terms",
    "server.transport.counted",
    "server.transport.framing",
    "server.transport.rpc_call",
    "server.transport.short_call",
    "server.transport.timeouts",
    "server.transport.direct.calls",
    "server.transport.direct.calm",
    "server.transport.direct.connection",
    "server.transport.direct.frames",
    "server.transport.direct.reading",
    "server.transport.direct.sending",
    "server.transport.direct.stream",
)
"""Nearly all of our own that runs for a small request, and nothing that mypyc understands otherwise than Python does.

It keeps no identity of tuples (`transport.direct.heads` asks for it), has no async generators (`transport.dispatch`),
and `del`s no variable of a coroutine (`transport.calls` does, since an error would keep it). A field `_name` becomes
`__name` in C, where it must not be a word of the language: no `_inline`, no `_thread`. No class that is not compiled
may be derived from one that is: `Index` has such a one, and so has `RpcCall` inside Envoy, where the sources run. The
`__init__` that a dataclass is given stays Python. And no instance may be referred to weakly: those references are told
nothing when it is freed. A `Mark` of it is."""

LIBRARY: Final = "library"
"""The folder of what the modules share. It is apart from them, where nobody takes their folders for packages."""

OLD_THROW: Final = r"the \(type, exc, tb\) signature of throw\(\)"
"""A warning of Python 3.12 and newer: mypyc's coroutines pass an error on to what they await as it was done before."""

_ROOT: Final = "layercast"
_SOURCES: Final = (".py", ".pyi", ".cpp", ".hpp")

_looked_in: Final[list[Path]] = []
"""Where the code of these sources would be, for this process; nothing before `look_in`."""

logger = logging.getLogger(__name__)


class Mark:
    """Lives as long as the one that has it, and is referred to weakly in its place: a class of `MODULES` can't be."""

    __slots__ = ("__weakref__",)


def default_folder() -> Path:
    """Return the folder in this installation."""
    return Path(sys.prefix) / "share" / _ROOT / "compiled"


def made_of() -> str:
    """Return a name for these sources and this interpreter."""
    name = hashlib.sha256(f"{sysconfig.get_config_var('EXT_SUFFIX')} {platform.machine()} {MODULES}".encode())
    for package in PACKAGES:
        root = source_of(package)
        for path in sorted(root.rglob("*.*p*")):
            if path.suffix in _SOURCES:
                content = path.read_bytes()
                name.update(f"\n{package}/{path.relative_to(root).as_posix()} {len(content)}\n".encode() + content)
    return name.hexdigest()[:24]


def source_of(package: str) -> Path:
    """Return the folder of one of `PACKAGES`."""
    return Path(importlib.import_module(f"{_ROOT}.{package}").__path__[0])


def use(folder: Path) -> bool:
    """Import compiled modules from `folder` from now on, if it has them of these sources; tell whether it has.

    What can't be read or loaded here is left alone, with a warning. RuntimeError when one of the modules was imported
    already: a class must not be there twice.
    """
    look_in(folder)
    root = next(filter(is_whole, _looked_in), None)
    if root is None:
        return False
    if early := [name for name in MODULES if f"{_ROOT}.{name}" in sys.modules]:
        raise RuntimeError(f"this is a bug: {early} were imported before their compiled code was looked for")
    (library,) = (root / LIBRARY).glob("*.so")
    sys.path.append(str(library.parent))
    try:
        importlib.import_module(library.name.partition(".")[0])
    except ImportError as error:  # made for another C library, or where no code may be run
        sys.path.remove(str(library.parent))
        logger.warning("compiled code can't be loaded, the sources run: %s", str(error).replace(str(library), "it"))
        return False
    # Where warnings are errors, it would take the place of the error, a cancellation for example.
    warnings.filterwarnings("ignore", OLD_THROW, DeprecationWarning)
    for package in dict.fromkeys(name.rpartition(".")[0] for name in MODULES):
        own = root.joinpath(_ROOT, *package.split("."))
        importlib.import_module(f"{_ROOT}.{package}").__path__.insert(0, str(own))
    return True


def look_in(folder: Path) -> None:
    """Let `kernel` look in `folder` from now on, also where the sources run. That it can't be read is only logged."""
    _looked_in.clear()
    try:
        if folder.is_dir():
            _looked_in.append(folder / made_of())
    except OSError as error:
        logger.warning("compiled code can't be read, the sources run: %s", error.strerror)


def kernel(name: str) -> Path | None:
    """Return the library of an engine's kernel that this processor runs best; None when there is none that it can."""
    return next(filter(None, (kernels.best(root / kernels.FOLDER, name) for root in _looked_in)), None)


def find(folder: Path) -> Path | None:
    """Return where in `folder` the code of these sources is, if all of it is there."""
    root = folder / made_of() if folder.is_dir() else None
    return root if root and is_whole(root) else None


def is_whole(root: Path) -> bool:
    """Tell whether all of `MODULES`, and the library that they share, are in the folder."""
    shared = len(list((root / LIBRARY).glob("*__mypyc.*so"))) == 1
    return shared and all(any(root.joinpath(_ROOT).glob(f"{name.replace('.', '/')}.*so")) for name in MODULES)


def in_use() -> bool:
    """Tell whether this process runs compiled modules."""
    module = sys.modules.get(f"{_ROOT}.{MODULES[0]}")
    return bool(module and module.__file__ and not module.__file__.endswith(".py"))
