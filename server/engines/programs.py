"""Engines that run a program exported with torch: TorchScript and torch.export."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from layercast.models.export.exported import load as load_exported
from layercast.models.export.torchscript import load as load_torchscript
from layercast.models.manifest import Manifest, ManifestError, Program
from layercast.server.engines import place
from layercast.server.engines.base import Inputs, Outputs, not_loaded
from layercast.server.engines.place import Place, Tensors
from layercast.server.engines.tensors import by_name


class ProgramEngine:
    """Runs a callable torch program in inference mode."""

    def __init__(self, name: str, program: Callable[..., object], manifest: Manifest, where: Place) -> None:
        self.name = name
        self.device = where.kind
        self._program = program
        self._manifest = manifest
        self._place = where

    @property
    def is_stateless(self) -> bool:
        """Whether nothing is left of a run that another, in another thread, could see or change.

        In a frozen program all is constant but what its forward writes to, which stays an attribute.
        """
        graph = getattr(self._program, "graph", None) if isinstance(self._program, torch.jit.ScriptModule) else None
        return graph is not None and not graph.findAllNodes("prim::GetAttr")

    def run(self, inputs: Inputs) -> Outputs:
        """Return every output for the batch."""
        return self._place.run(inputs, self._forward)

    def _forward(self, tensors: Tensors) -> dict[str, Tensor]:
        return by_name(self._program(*tensors.values()), self._manifest.outputs)


def torchscript(directory: Path, manifest: Manifest, device: torch.device) -> ProgramEngine:
    """Load `model.ts`."""
    return _engine(load_torchscript, directory, manifest, device, "torchscript")


def exported(directory: Path, manifest: Manifest, device: torch.device) -> ProgramEngine:
    """Load `model.pt2`."""
    return _engine(load_exported, directory, manifest, device, "exported")


def _engine(
    load: Callable[..., Callable[..., object]], directory: Path, manifest: Manifest, device: torch.device, name: Program
) -> ProgramEngine:
    program, where = manifest.programs[name], place.at(device, manifest.inputs)
    try:
        return ProgramEngine(name, load(directory, manifest, str(where.device)), manifest, where)
    except ManifestError:
        raise
    except Exception as error:
        raise not_loaded(program, error) from error
