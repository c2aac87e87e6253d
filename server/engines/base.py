"""What runs a batch: the contract every engine keeps."""

from collections.abc import Mapping
from typing import Protocol

from layercast.server.work import Array

Inputs = Mapping[str, Array]
Outputs = dict[str, Array]


class EngineError(Exception):
    """An engine can't be loaded on this machine; the text says why."""


class Engine(Protocol):
    """Runs the model of one artefact. Called by one thread at a time; inputs may be read-only and are never changed.

    `name` is the engine's (`eager`, `torchscript`, `onnx`, `exported`), `device` where it really runs (`cpu`, `cuda`).
    """

    name: str
    device: str

    def run(self, inputs: Inputs) -> Outputs:
        """Return every output by name for the batch `inputs`: arrays by input name, all with the same dimension 0."""


def not_loaded(program: str, error: Exception) -> EngineError:
    """Return the error for a program that its runtime refuses to load; runtimes rarely say which file they mean."""
    lines = str(error).strip().splitlines()
    return EngineError(f"{program} can't be loaded: {type(error).__name__}: {lines[0] if lines else ''}"[:500])
