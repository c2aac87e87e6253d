"""Convolutional blocks: squeeze-and-excitation and the residual block."""

from torch import Tensor, nn

from layercast.models.layers.checks import positive


class SqueezeExcitation(nn.Module):
    """Scales channels by a gate computed from their global means: [N, C, H, W] -> [N, C, H, W] (Hu et al. 2018).

    `channels` below `reduction` is refused, since the squeezed layer would have no unit.
    """

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        positive("SqueezeExcitation", channels=channels, reduction=reduction)
        if channels < reduction:
            raise ValueError(
                f"SqueezeExcitation: channels ({channels}) must be at least reduction ({reduction}); "
                f"pass a smaller reduction"
            )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.squeeze = nn.Linear(channels, channels // reduction)
        self.relu = nn.ReLU(inplace=True)
        self.excite = nn.Linear(channels // reduction, channels)
        self.gate = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` with every channel scaled by its gate."""
        pooled = self.pool(x).flatten(1)
        gate: Tensor = self.gate(self.excite(self.relu(self.squeeze(pooled))))
        return x * gate[:, :, None, None]


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions with batch norm and a shortcut: [N, Cin, H, W] -> [N, Cout, H/stride, W/stride].

    The basic block of He et al. 2015; the shortcut is a 1×1 convolution with batch norm where the shape changes.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, squeeze_excitation: bool = False) -> None:
        super().__init__()
        positive("ResidualBlock", in_channels=in_channels, out_channels=out_channels, stride=stride)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.se = SqueezeExcitation(out_channels) if squeeze_excitation else nn.Identity()
        self.shortcut = (
            nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels))
            if stride != 1 or in_channels != out_channels
            else nn.Identity()
        )
        self.relu2 = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(residual(x) + shortcut(x))."""
        out: Tensor = self.relu1(self.bn1(self.conv1(x)))
        out = self.se(self.bn2(self.conv2(out)))
        out += self.shortcut(x)
        activated: Tensor = self.relu2(out)
        return activated
