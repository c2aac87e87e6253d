"""Engine on ONNX Runtime."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Literal

import torch
from torch import Tensor

from layercast.models.datatypes import TORCH_DTYPES
from layercast.models.manifest import Manifest, TensorSpec
from layercast.models.onnx_runtime import onnxruntime
from layercast.server.engines import place
from layercast.server.engines.base import EngineError, Inputs, Outputs, in_memory, not_loaded
from layercast.server.engines.place import OnCard, Tensors

CPU: Final = ("CPUExecutionProvider",)
"""ONNX Runtime's providers where there is no card."""

_SLOW_ON_CPU: Final = ("SkipLayerNormFusion",)
"""Optimisers that are left out there. What this one makes of an Add and a LayerNormalization computes one number after
the other: three to five times as long as both by themselves, up to a quarter of a transformer (ONNX Runtime 1.31)."""

_BFLOAT16: Final = 16
"""Of onnx.TensorProto.DataType; numpy has no such type."""


class OnnxEngine:
    """Runs `model.onnx` with ONNX Runtime on the CPU or a CUDA device, or the int8 program on the CPU.

    On a card it reads and writes torch's tensors there (IO binding), on the stream of its place.
    """

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
        where = place.at(device, manifest.inputs) if device.type == "cuda" else None
        self._place = where if isinstance(where, OnCard) else None
        providers = self._place.card.providers(self._place.computing) if self._place else CPU
        self._session = open_session(content, manifest.programs[name], threads, providers)
        self.device = device.type
        self._specs = manifest.outputs
        self._outputs = [spec.name for spec in manifest.outputs]

    def run(self, inputs: Inputs) -> Outputs:
        """Return every output for the batch."""
        if self._place:
            return self._place.run(inputs, self._bound)
        return dict(zip(self._outputs, self._session.run(self._outputs, dict(inputs)), strict=True))

    def shrink(self, inputs: Inputs) -> None:
        """Run the batch `inputs`, and give back the memory that larger ones took and that is kept for the next."""
        if self._place:
            return
        options = onnxruntime.RunOptions()
        options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        self._session.run(self._outputs, dict(inputs), options)

    def _bound(self, tensors: Tensors) -> dict[str, Tensor]:
        """Run on tensors that are where the session computes; what it gives is there too, where its size is known."""
        binding = self._session.io_binding()
        for name, tensor in tensors.items():
            binding.bind_input(name, **_buffer(tensor))
        rows = len(next(iter(tensors.values())))
        results = {spec.name: self._room(spec, rows) for spec in self._specs if not spec.dynamic_dimensions()}
        for name in self._outputs:
            if name in results:
                binding.bind_output(name, **_buffer(results[name]))
            else:
                binding.bind_output(name, "cpu")
        self._session.run_with_iobinding(binding)
        values = binding.get_outputs()
        return {
            name: results[name] if name in results else torch.from_numpy(value.numpy())
            for name, value in zip(self._outputs, values, strict=True)
        }

    def _room(self, spec: TensorSpec, rows: int) -> Tensor:
        assert self._place is not None
        return torch.empty((rows, *spec.shape[1:]), dtype=TORCH_DTYPES[spec.datatype], device=self._place.device)


def _buffer(tensor: Tensor) -> dict[str, Any]:
    """Return what ONNX Runtime asks of memory that it is to read or write."""
    bf16 = tensor.dtype == torch.bfloat16
    return {
        "device_type": tensor.device.type,
        "device_id": tensor.device.index or 0,
        "element_type": _BFLOAT16 if bf16 else torch.empty(0, dtype=tensor.dtype).numpy().dtype.type,
        "shape": tuple(tensor.shape),
        "buffer_ptr": tensor.data_ptr(),
    }


def open_session(
    content: bytes, program: str, threads: int, providers: Sequence[Any] = CPU
) -> "onnxruntime.InferenceSession":
    """Return ONNX Runtime's session of the model in `content`; EngineError names it `program`."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Between the parts of a run its threads spin: to wake one takes as long as a part does. Between runs they sleep, or
    # they would take the processors from the event loop.
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if threads > 1 else "0")
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # As `processors` says. The first session of a process sets it for the thread that opens it, one way or the other.
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    with in_memory(content) as path:
        try:
            session = onnxruntime.InferenceSession(
                path, options, providers=list(providers), disabled_optimizers=_SLOW_ON_CPU if providers == CPU else ()
            )
        except Exception as error:  # its exceptions share no class of their own
            raise not_loaded(program, error, path) from error
    # Asked for a provider that it can't load, ONNX Runtime falls back to the CPU without an error.
    wanted = providers[0] if isinstance(providers[0], str) else providers[0][0]
    if session.get_providers()[0] != wanted:
        raise EngineError(f"ONNX Runtime has no working {wanted}; it would run on the CPU unasked")
    return session
