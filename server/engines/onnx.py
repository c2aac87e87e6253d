"""Engine on ONNX Runtime."""

from pathlib import Path
from typing import Literal

import torch

from layercast.models.manifest import Manifest
from layercast.models.onnx_runtime import onnxruntime
from layercast.server.engines.base import EngineError, Inputs, Outputs, in_memory, not_loaded

_PROVIDERS = {"cpu": ["CPUExecutionProvider"], "cuda": ["CUDAExecutionProvider", "CPUExecutionProvider"]}


class OnnxEngine:
    """Runs `model.onnx` with ONNX Runtime on the CPU or a CUDA device, or the int8 program on the CPU."""

    def __init__(
        self,
        directory: Path,
        manifest: Manifest,
        device: torch.device,
        threads: int,
        name: Literal["onnx", "onnx-int8"] = "onnx",
    ) -> None:
        if name == "onnx-int8" and device.type != "cpu":
            raise EngineError('engine onnx-int8 runs on the CPU; set device = "cpu" for this model')
        self.name: str = name
        content = manifest.read_verified(directory, manifest.programs[name])
        self._session = open_session(content, manifest.programs[name], device, threads)
        self.device = device.type
        self._outputs = [spec.name for spec in manifest.outputs]

    def run(self, inputs: Inputs) -> Outputs:
        """Return every output for the batch."""
        return dict(zip(self._outputs, self._session.run(self._outputs, dict(inputs)), strict=True))


def open_session(content: bytes, program: str, device: torch.device, threads: int) -> "onnxruntime.InferenceSession":
    """Return ONNX Runtime's session of the model in `content`; EngineError names it `program`."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Idle threads that spin would take the CPU from the event loop.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    providers = _PROVIDERS[device.type]
    with in_memory(content) as path:
        try:
            session = onnxruntime.InferenceSession(path, options, providers=providers)
        except Exception as error:  # its exceptions share no class of their own
            raise not_loaded(program, error, path) from error
    # Asked for a provider that it can't load, ONNX Runtime falls back to the CPU without an error.
    if session.get_providers()[0] != providers[0]:
        raise EngineError(f"ONNX Runtime has no working {providers[0]}; it would run on the CPU unasked")
    return session
