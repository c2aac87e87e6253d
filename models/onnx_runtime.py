"""ONNX Runtime, imported with its telemetry off.

From 1.31 on, importing it writes an identifier and a database below the user's cache and brings an uploader, unless
the variable is set before. Our code imports it from here: `from layercast.models.onnx_runtime import onnxruntime`.
"""

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime

__all__ = ["onnxruntime"]
