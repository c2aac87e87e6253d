"""What tests run both engines on kernels of layercast's own with: a model that each fits."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from test_encoder_engine import exported, inputs_for
from test_server_inference import rows_for
from torch import nn

from layercast.models.manifest import Manifest


@dataclass(frozen=True)
class Case:
    """An engine, a version that it can run, that version's module, and why it can't run others."""

    engine: str
    directory: Path
    module: nn.Module
    misses: str

    @property
    def name(self) -> str:
        """The model's."""
        return self.directory.parent.name

    @property
    def manifest(self) -> Manifest:
        """The version's."""
        return Manifest.read(self.directory)

    def inputs(self, rows: int, length: int = 20) -> np.ndarray:
        """Return some rows; texts are of mixed lengths."""
        return (
            rows_for("resnet", rows)
            if self.engine == "winograd"
            else inputs_for("before", rows, length)["tokens"].numpy()
        )


ENGINES = ("winograd", "encoder")


def case_of(engine: str, repository: Path, modules: dict[str, nn.Module]) -> Case:
    """Return the case of an engine."""
    if engine == "winograd":
        return Case("winograd", repository / "resnet" / "1", modules["resnet"], "convolution")
    module, directory = exported("before")
    return Case("encoder", directory, module, "self-attention")
