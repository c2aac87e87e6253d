"""Multi-layer perceptrons: the general MLP and the MNIST classifier."""

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from layercast.models.layers.activations import activation, dropout_for
from layercast.models.layers.checks import positive, probability
from layercast.models.manifest import TensorSpec


class Block(nn.Sequential):
    """Linear -> BatchNorm1d -> activation: [N, in_features] -> [N, out_features]."""

    def __init__(self, in_features: int, out_features: int, activation_name: str = "relu") -> None:
        positive("Block", in_features=in_features, out_features=out_features)
        super().__init__(
            nn.Linear(in_features, out_features), nn.BatchNorm1d(out_features), activation(activation_name)
        )


class MLP(nn.Module):
    """Linear, BatchNorm1d, activation, Dropout per hidden size, then a Linear: x [N, input] -> logits [N, output]."""

    output_names: ClassVar[tuple[str, ...]] = ("logits",)

    def __init__(
        self,
        input_size: int = 784,
        hidden_sizes: Sequence[int] = (512, 256, 128),
        output_size: int = 10,
        dropout: float = 0.2,
        activation_name: str = "relu",
    ) -> None:
        super().__init__()
        positive("MLP", input_size=input_size, output_size=output_size)
        probability("MLP", dropout=dropout)
        if not isinstance(hidden_sizes, list | tuple):
            raise ValueError(
                f"MLP: hidden_sizes must be a list of sizes, for instance [512, 256], got {hidden_sizes!r}"
            )
        layers: list[nn.Module] = []
        self.input_size = size = input_size
        for index, hidden in enumerate(hidden_sizes):
            positive("MLP", **{f"hidden_sizes[{index}]": hidden})
            layers += [Block(size, hidden, activation_name), dropout_for(activation_name, dropout)]
            size = hidden
        self.hidden = nn.Sequential(*layers)
        self.head = nn.Linear(size, output_size)

    def input_specs(self) -> tuple[TensorSpec, ...]:
        """Return what `forward` takes, batch first."""
        return (TensorSpec(name="x", datatype="FP32", shape=(-1, self.input_size)),)

    def forward(self, x: Tensor) -> Tensor:
        """Return unnormalised class scores."""
        logits: Tensor = self.head(self.hidden(x))
        return logits


class MNISTClassifier(nn.Module):
    """Digit classifier: image [N, 1, 28, 28] or [N, 784], values 0 to 1 -> logits [N, 10]."""

    output_names: ClassVar[tuple[str, ...]] = ("logits",)

    def __init__(self, dropout: float = 0.2) -> None:
        super().__init__()
        probability("MNISTClassifier", dropout=dropout)
        self.flatten = nn.Flatten()
        self.net = nn.Sequential(
            Block(784, 512), nn.Dropout(dropout), Block(512, 256), nn.Dropout(dropout), nn.Linear(256, 10)
        )

    def input_specs(self) -> tuple[TensorSpec, ...]:
        """Return what `forward` takes, batch first."""
        return (TensorSpec(name="image", datatype="FP32", shape=(-1, 1, 28, 28), range=(0, 1)),)

    def forward(self, image: Tensor) -> Tensor:
        """Return unnormalised class scores."""
        logits: Tensor = self.net(self.flatten(image))
        return logits
