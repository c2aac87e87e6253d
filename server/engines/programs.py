"""Engines that run a program exported with torch: TorchScript and torch.export."""

from collections.abc import Callable
from pathlib import Path

import torch

from layercast.models.export.exported import load as load_exported
from layercast.models.export.torchscript import load as load_torchscript
from layercast.models.manifest import Manifest, ManifestError, Program
from layercast.server.engines.base import Inputs, Outputs, not_loaded
from layercast.server.engines.tensors import to_outputs, to_tensors


class ProgramEngine:
    """Runs a callable torch program in inference mode."""

    def __init__(self, name: str, program: Callable[..., object], manifest: Manifest, device: torch.device) -> None:
        self.name = name
        self.device = device.type
        self._program = program
        self._manifest = manifest
        self._device = device

    def run(self, inputs: Inputs) -> Outputs:
        """Return every output for the batch."""
        with torch.inference_mode():
            tensors = to_tensors(inputs, self._manifest.inputs, self._device)
            return to_outputs(self._program(*tensors.values()), self._manifest.outputs)


def torchscript(directory: Path, manifest: Manifest, device: torch.device) -> ProgramEngine:
    """Load `model.ts`."""
    program = _loaded(load_torchscript, directory, manifest, device, "torchscript")
    return ProgramEngine("torchscript", program, manifest, device)


def exported(directory: Path, manifest: Manifest, device: torch.device) -> ProgramEngine:
    """Load `model.pt2`."""
    program = _loaded(load_exported, directory, manifest, device, "exported")
    return ProgramEngine("exported", program, manifest, device)


def _loaded(
    load: Callable[..., Callable[..., object]], directory: Path, manifest: Manifest, device: torch.device, name: Program
) -> Callable[..., object]:
    program = manifest.programs[name]
    try:
        return load(directory, manifest, device.type)
    except ManifestError:
        raise
    except Exception as error:
        raise not_loaded(program, error) from error
