"""Layers of the zoo: building blocks that any module may use."""

from layercast.models.layers.activations import activation
from layercast.models.layers.attention import AttentionWeights, MultiHeadAttention, TransformerEncoderBlock
from layercast.models.layers.basic import CenteredLayer, Linear, RunningNorm
from layercast.models.layers.residual import ResidualBlock, SqueezeExcitation

__all__ = [
    "AttentionWeights",
    "CenteredLayer",
    "Linear",
    "MultiHeadAttention",
    "ResidualBlock",
    "RunningNorm",
    "SqueezeExcitation",
    "TransformerEncoderBlock",
    "activation",
]
