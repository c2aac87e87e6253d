"""The modules that run for every request, compiled to native code by mypyc, in the place of their sources.

Optional: `layercast compile` makes them, `layercast serve` uses them if they are there and were made of just these
sources. A folder is named after all that it was made of, so nothing stale is ever used.
"""

import hashlib
import importlib
import platform
import sys
import sysconfig
from pathlib import Path
from typing import Final

PACKAGES: Final = ("proto", "models", "client", "server")
"""What the compiler reads: it takes types and constants from every module that one of `MODULES` imports."""

MODULES: Final = (
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
    "server.batching.waiting",
    "server.service.bunch",
    "server.service.form",
    "server.service.heads",
    "server.service.plain",
    "server.service.short",
    "server.service.template",
    "server.service.terms",
    "server.transport.direct.calm",
    "server.transport.direct.connection",
    "server.transport.direct.frames",
    "server.transport.direct.reading",
    "server.transport.direct.sending",
)
"""Two thirds of the time of a small request, and nothing that mypyc understands otherwise than Python does: it keeps no
identity of tuples (`transport.direct.heads` asks for it), and has no async generators (`transport.rpc_call`)."""

_ROOT: Final = "layercast"


def default_folder() -> Path:
    """Return the folder in this installation: what may write there may change the sources too."""
    return Path(sys.prefix) / "share" / _ROOT / "compiled"


def made_of() -> str:
    """Return a name for these sources and this interpreter."""
    name = hashlib.sha256(f"{sysconfig.get_config_var('EXT_SUFFIX')} {platform.machine()} {MODULES}".encode())
    for package in PACKAGES:
        root = source_of(package)
        for path in sorted(root.rglob("*.py*")):
            if path.suffix in (".py", ".pyi"):
                content = path.read_bytes()
                name.update(f"\n{package}/{path.relative_to(root).as_posix()} {len(content)}\n".encode() + content)
    return name.hexdigest()[:24]


def source_of(package: str) -> Path:
    """Return the folder of one of `PACKAGES`."""
    return Path(importlib.import_module(f"{_ROOT}.{package}").__path__[0])


def use(folder: Path) -> bool:
    """Import compiled modules from `folder` from now on, if it has them of these sources; tell whether it has.

    RuntimeError when one of them was imported already: a class must not be there twice.
    """
    if not folder.is_dir() or not (root := folder / made_of()).is_dir():
        return False
    if early := [name for name in MODULES if f"{_ROOT}.{name}" in sys.modules]:
        raise RuntimeError(f"this is a bug: {early} were imported before their compiled code was looked for")
    sys.path.append(str(root))  # where all of them find the library that they share
    for package in dict.fromkeys(name.rpartition(".")[0] for name in MODULES):
        own = root.joinpath(_ROOT, *package.split("."))
        importlib.import_module(f"{_ROOT}.{package}").__path__.insert(0, str(own))
    return True


def in_use() -> bool:
    """Tell whether this process runs compiled modules."""
    module = sys.modules.get(f"{_ROOT}.{MODULES[0]}")
    return bool(module and module.__file__ and not module.__file__.endswith(".py"))
