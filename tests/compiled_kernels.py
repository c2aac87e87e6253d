"""Kernels compiled for tests, without the modules, which take a minute."""

from pathlib import Path

import pytest

from layercast.server import compiled, kernels


def make(output: Path) -> None:
    """Make the kernels in `output`, as `layercast compile --output` does; skip the test where they can't run here."""
    if reason := kernels.missing():
        pytest.skip(f"needs a C++ compiler, and x86-64: {reason}")
    if not any(needs <= kernels.instructions() for needs in kernels.LEVELS.values()):
        pytest.skip("this processor has neither AVX-512 nor AVX2")
    assert kernels.make(output / compiled.made_of() / kernels.FOLDER) == ""


def library_of(engine: str, level: str, folder: Path) -> Path:
    """Return the library of that level that `make` made in `folder`; skip the test where it can't run here."""
    if not kernels.LEVELS[level] <= kernels.instructions():
        pytest.skip(f"this processor can't run x86-64-{level}")
    return folder / compiled.made_of() / kernels.FOLDER / f"{engine}-{level}.so"
