"""The smallest architectures: SimpleNet and SharedWeights."""

from typing import ClassVar

from torch import Tensor, nn

from layercast.models.layers.checks import positive
from layercast.models.manifest import TensorSpec


class SimpleNet(nn.Module):
    """Two linear layers with a ReLU between: x [N, 784] -> logits [N, 10]."""

    output_names: ClassVar[tuple[str, ...]] = ("logits",)

    def __init__(self, input_size: int = 784, hidden_size: int = 256, output_size: int = 10) -> None:
        super().__init__()
        positive("SimpleNet", input_size=input_size, hidden_size=hidden_size, output_size=output_size)
        self.fc1 = nn.Linear(input_size, hidden_size)
        self.relu = nn.ReLU()
        self.fc2 = nn.Linear(hidden_size, output_size)

    def input_specs(self) -> tuple[TensorSpec, ...]:
        """Return what `forward` takes, batch first."""
        return (TensorSpec(name="x", datatype="FP32", shape=(-1, self.fc1.in_features)),)

    def forward(self, x: Tensor) -> Tensor:
        """Return unnormalised class scores."""
        logits: Tensor = self.fc2(self.relu(self.fc1(x)))
        return logits


class SharedWeights(nn.Module):
    """One linear layer used twice with a ReLU between: x [N, size] -> output [N, size]; its weights count once."""

    output_names: ClassVar[tuple[str, ...]] = ("output",)

    def __init__(self, size: int = 10) -> None:
        super().__init__()
        positive("SharedWeights", size=size)
        self.shared = nn.Linear(size, size)
        self.relu = nn.ReLU()

    def input_specs(self) -> tuple[TensorSpec, ...]:
        """Return what `forward` takes, batch first."""
        return (TensorSpec(name="x", datatype="FP32", shape=(-1, self.shared.in_features)),)

    def forward(self, x: Tensor) -> Tensor:
        """Return shared(relu(shared(x)))."""
        output: Tensor = self.shared(self.relu(self.shared(x)))
        return output
