"""Kernels of engines, written in C++: `layercast compile` makes a library of each for each of the `LEVELS`."""

import os
import platform
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Final

SOURCES: Final = {name: f"engines/{name}/{name}.cpp" for name in ("winograd", "encoder")}
"""Where each kernel's source is, from here."""

_V3: Final = frozenset(("avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"))
_V4: Final = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}

LEVELS: Final = {"v4": _V4, "v3": _V3}
"""The levels of x86-64 that are compiled for, the best first, and what a processor must have, in the words of Linux.

Not for the processor that compiles: another may run the code.
"""

FOLDER: Final = "kernels"
"""The folder of the libraries, in that of the compiled code."""

_FLAGS: Final = ("-O3", "-std=c++17", "-shared", "-fPIC", "-pthread", "-fno-math-errno")
_MACHINES: Final = ("x86_64", "AMD64")


def best(folder: Path, name: str) -> Path | None:
    """Return the best library of the kernel `name` in `folder` that this processor can run."""
    for level, needs in LEVELS.items():
        library = _library(folder, name, level)
        if needs <= instructions() and library.is_file():
            return library
    return None


def why_none(folder: Path, name: str) -> str:
    """Return why `folder` has no library of the kernel `name` for this processor, "" if it has."""
    if best(folder, name):
        return ""
    if are_whole(folder):
        return "this processor has neither AVX-512 nor AVX2"
    return missing() or "`layercast compile` makes its kernel"


def are_whole(folder: Path) -> bool:
    """Tell whether `folder` has every library."""
    return all(_library(folder, name, level).is_file() for name in SOURCES for level in LEVELS)


@cache
def instructions() -> frozenset[str]:
    """Return what this processor has, nothing where the system does not tell as Linux does."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line for line in lines if line.startswith("flags")), "").split())


def missing() -> str:
    """Return why none can be made here, "" where they can."""
    if platform.machine() not in _MACHINES:
        return f"it is for processors of the kind x86-64, not {platform.machine()}"
    if not _compiler():
        return f"it needs the C++ compiler {os.environ.get('CXX') or 'c++'!r}: apt install g++, or name yours in CXX"
    return ""


def make(folder: Path) -> str:
    """Make the new folder `folder` with every library; return why that can't be, in a line, and leave none then."""
    if reason := missing():
        return reason
    folder.mkdir(parents=True)
    for name, source in SOURCES.items():
        for level in LEVELS:
            target = _library(folder, name, level)
            command = [*_compiler(), *_FLAGS, f"-march=x86-64-{level}", str(Path(__file__).parent / source)]
            if failed := _run([*command, "-o", str(target)]):
                shutil.rmtree(folder)
                return f"the C++ compiler failed: {failed}"
    folder.chmod(0o755)  # whoever serves may be another than who compiles
    return ""


def _library(folder: Path, name: str, level: str) -> Path:
    return folder / f"{name}-{level}.so"


def _compiler() -> list[str]:
    """Return the command of the C++ compiler, [] where there is none."""
    for command in (os.environ["CXX"],) if os.environ.get("CXX") else ("c++", "g++"):
        words = command.split()
        if words and shutil.which(words[0]):
            return words
    return []


def _run(command: list[str]) -> str:
    """Run a compiler; return the line that says why it failed."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    except OSError as error:  # a file that is no program
        return error.strerror or type(error).__name__
    if not done.returncode:
        return ""
    lines = done.stdout.splitlines() or ["no output"]
    return next((line for line in lines if "error" in line), lines[-1])
