"""A plugin for pytest: the tests run with the compiled modules."""

import os
from pathlib import Path

from layercast.server import compiled

assert compiled.use(Path(os.environ["LAYERCAST_TEST_COMPILED"]))
