"""A small residual network for 32×32 images (after He et al. 2015)."""

from typing import ClassVar

from torch import Tensor, nn

from layercast.models.layers.checks import positive
from layercast.models.layers.residual import ResidualBlock
from layercast.models.manifest import TensorSpec


class ResNetLike(nn.Module):
    """Stem, two residual blocks at 64 and two at 128 channels, global average pool, linear head.

    image [N, 3, H, W], values 0 to 1 -> logits [N, num_classes].
    """

    output_names: ClassVar[tuple[str, ...]] = ("logits",)

    def __init__(self, num_classes: int = 10, squeeze_excitation: bool = False) -> None:
        super().__init__()
        positive("ResNetLike", num_classes=num_classes)
        self.stem = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = self._stage(64, 64, 1, squeeze_excitation)
        self.layer2 = self._stage(64, 128, 2, squeeze_excitation)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.head = nn.Linear(128, num_classes)
        self.reset_parameters()

    @staticmethod
    def _stage(in_channels: int, out_channels: int, stride: int, squeeze_excitation: bool) -> nn.Sequential:
        return nn.Sequential(
            ResidualBlock(in_channels, out_channels, stride, squeeze_excitation),
            ResidualBlock(out_channels, out_channels, 1, squeeze_excitation),
        )

    def reset_parameters(self) -> None:
        """Kaiming-normal convolutions (He et al. 2015), which torch's default is not."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def input_specs(self) -> tuple[TensorSpec, ...]:
        """Return what `forward` takes, batch first; other heights and widths work as well."""
        return (TensorSpec(name="image", datatype="FP32", shape=(-1, 3, 32, 32), range=(0, 1)),)

    def forward(self, image: Tensor) -> Tensor:
        """Return unnormalised class scores."""
        x = self.relu(self.bn(self.stem(image)))
        x = self.layer2(self.layer1(x))
        logits: Tensor = self.head(self.flatten(self.pool(x)))
        return logits
