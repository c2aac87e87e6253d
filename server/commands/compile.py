"""`layercast compile`: make native code of the modules that run for every request, and of the kernels of engines.

The server then uses it.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from layercast.server import compiled, kernels

# mypyc needs the types of our own modules and of numpy; of what is left out here it reads hundreds of files.
_CONFIGURATION: Final = """\
[mypy]
mypy_path = .
namespace_packages = True
explicit_package_bases = True
ignore_missing_imports = True

[mypy-torch.*,torchvision.*,onnx.*,onnxruntime.*,onnxscript.*,transformers.*,pyarrow.*,sklearn.*,matplotlib.*,\
starlette.*,uvicorn.*,rich.*,pydantic.*,pydantic_settings.*]
follow_imports = skip
"""
_LINES: Final = 15
_WORK: Final = ".compiling-"
_MADE: Final = "made"
_OURS: Final = re.compile(r"[0-9a-f]{24}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where to."""
    parser.add_argument(
        "--output", type=Path, default=compiled.default_folder(), metavar="DIR",
        help="folder, if not the one in this installation; tell `layercast serve --compiled DIR`",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Compile, unless that was done; 1 when something is missing or the compiler fails."""
    if _is_done(args.output):
        return 0
    if missing := "" if _modules_in(args.output) else _missing():
        print(f"layercast compile: {missing}", file=sys.stderr)
        return 1
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        with _workplace(args.output) as work:
            return _made(args.output, work)
    except OSError as error:
        print(f"layercast compile: {args.output}: {error.strerror}; name another with --output", file=sys.stderr)
        return 1


def _made(output: Path, work: Path) -> int:
    """Make what is not in `output` yet, in the folder `work`; return the command's exit status."""
    if _is_done(output):  # by the one that was waited for
        return 0
    if done := _modules_in(output):
        _add_kernels(work, done)
        return 0
    target, began = output / compiled.made_of(), time.perf_counter()
    if failed := _compile(work):
        print(f"layercast compile: the compiler failed, and the server runs without:\n{failed}", file=sys.stderr)
        return 1
    _make_kernels(work)
    _keep(work, target)
    print(f"compiled {len(compiled.MODULES)} modules in {time.perf_counter() - began:.0f} s: {target}")
    return 0


def _is_done(output: Path) -> bool:
    """Tell, and say, whether all the code is there that can be made here."""
    done = _modules_in(output)
    if done is None:
        return False
    if not kernels.are_whole(done / kernels.FOLDER):
        if not (reason := kernels.missing()):
            return False
        _without_kernels(reason)
    print(f"already compiled: {done}")
    return True


def _modules_in(output: Path) -> Path | None:
    """Return where the modules are, if they were made by the mypy that is installed, or none is."""
    done = compiled.find(output)
    return done if done and (done / _maker()).exists() else None


def _maker() -> str:
    """Return the name of an empty file that says by what the code was made, or "" if that is not installed."""
    try:
        return f"mypy-{version('mypy')}"
    except PackageNotFoundError:
        return ""


@contextmanager
def _workplace(output: Path) -> Iterator[Path]:
    """Make a folder in `output` to compile in, when no other process does; what killed ones left there goes."""
    handle = os.open(output, os.O_RDONLY)
    try:
        if _lock(handle, output):
            for left in output.glob(f"{_WORK}*"):
                # Its compiler may have outlived it: what that still writes goes the next time.
                shutil.rmtree(left, ignore_errors=True)
        with TemporaryDirectory(dir=output, prefix=_WORK) as work:
            yield Path(work)
    finally:
        os.close(handle)


def _lock(handle: int, output: Path) -> bool:
    """Take the folder's lock, which a process lets go of however it ends; False where there are no such locks."""
    try:
        import fcntl
    except ModuleNotFoundError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"waiting for another `layercast compile` in {output}", file=sys.stderr)
        fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError:  # a file system without
        return False
    return True


def _missing() -> str:
    """Return what is missing here, and how to get it."""
    if find_spec("mypyc") is None or find_spec("setuptools") is None:
        return "this needs mypy: pip install 'layercast[compile]'"
    compiler = (os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc").split()[0]
    if not shutil.which(compiler):
        return f"this needs the C compiler {compiler!r}: apt install gcc, or name yours in CC"
    return ""


def _compile(work: Path) -> str:
    """Compile in the folder `work`; return the last lines of what the compiler said if it failed."""
    for package in compiled.PACKAGES:
        shutil.copytree(
            compiled.source_of(package), work / "layercast" / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    (work / "mypy.ini").write_text(_CONFIGURATION)
    files = ["/".join(("layercast", *name.split("."))) + ".py" for name in compiled.MODULES]
    # Not where this process stands: it may be among the sources.
    command = [sys.executable, "-P", "-m", "mypyc", "--config-file=mypy.ini", *files]
    environment = {name: value for name, value in os.environ.items() if name not in ("MYPYPATH", "PYTHONPATH")}
    done = subprocess.run(
        command,
        cwd=work,
        env=environment | {"MYPYC_DEBUG_LEVEL": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return "\n".join(done.stdout.splitlines()[-_LINES:] or ["no output"]) if done.returncode else ""


def _make_kernels(work: Path) -> Path | None:
    """Make the kernels in the folder `work` and return where they are; say why not where that can't be."""
    folder = work / _MADE / kernels.FOLDER
    if failed := kernels.make(folder):
        _without_kernels(failed)
        return None
    return folder


def _without_kernels(reason: str) -> None:
    print(f"layercast compile: without engine {', '.join(kernels.SOURCES)}: {reason}", file=sys.stderr)


def _add_kernels(work: Path, done: Path) -> None:
    """Make the kernels, and move them to the modules in `done`, all at once."""
    if made := _make_kernels(work):
        target = done / kernels.FOLDER
        if target.exists():
            target.rename(work / kernels.FOLDER)
        made.rename(target)
        print(f"compiled the kernels of engine {', '.join(kernels.SOURCES)}: {target}")


def _keep(work: Path, target: Path) -> None:
    """Move what was compiled to `target`, all at once, and remove what was compiled of other sources, or otherwise."""
    made = work / _MADE
    for library in work.glob("*.so"):
        _move(library, made / compiled.LIBRARY / library.name)
    for library in (work / "layercast").rglob("*.so"):
        _move(library, made / library.relative_to(work))
    for folder in (made, *filter(Path.is_dir, made.rglob("*"))):
        folder.chmod(0o755)  # whoever serves may be another than who compiles
    (made / _maker()).touch()
    for old in target.parent.iterdir():
        # Out of sight first: half of it must not be taken for the whole.
        if old == target or (_OURS.fullmatch(old.name) and (old / compiled.LIBRARY).is_dir()):
            old.rename(work / old.name)
    made.rename(target)


def _move(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    source.rename(target)
