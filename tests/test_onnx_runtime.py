"""ONNX Runtime as our code imports it."""

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["layercast.server.engines.onnx", "layercast.models.export.parity"])
def test_it_leaves_no_telemetry_behind(tmp_path, module):
    environ = {**os.environ, "HOME": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    environ.pop("ORT_DISABLE_TELEMETRY", None)
    environ.pop("XDG_CACHE_HOME", None)
    subprocess.run([sys.executable, "-c", f"import {module}"], env=environ, capture_output=True, check=True)
    assert list(tmp_path.rglob("*")) == []
