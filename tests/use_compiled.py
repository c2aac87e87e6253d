"""A plugin for pytest: the tests run with the compiled modules."""

import os
from pathlib import Path

import pytest

from layercast.server import compiled

assert compiled.use(Path(os.environ["LAYERCAST_TEST_COMPILED"]))


def pytest_configure(config: pytest.Config) -> None:
    """Ignore here too what `use` ignores: each test has filters of its own."""
    config.addinivalue_line("filterwarnings", f"ignore:{compiled.OLD_THROW}:DeprecationWarning")
