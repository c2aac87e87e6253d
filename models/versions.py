"""Versions of the tools that make an artefact, read without importing them."""

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Final

_PACKAGES: Final = ("layercast", "torch", "safetensors", "onnx", "onnxscript")
_ONNXRUNTIME: Final = ("onnxruntime-gpu", "onnxruntime")
"""Two packages with the same modules inside; only one of them should be installed."""


def tool_versions() -> dict[str, str]:
    """Return the version of Python and of every package that shapes an artefact; absent packages are left out."""
    found = {name: _version(name) for name in _PACKAGES}
    found["onnxruntime"] = next(filter(None, map(_version, _ONNXRUNTIME)), None)
    return {"python": platform.python_version(), **{name: text for name, text in found.items() if text}}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
