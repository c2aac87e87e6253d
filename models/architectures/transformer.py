"""The zoo's text classifier: a transformer encoder over the bytes of a text."""

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from layercast.models.layers.attention import TransformerEncoderBlock
from layercast.models.layers.checks import positive, probability, recording
from layercast.models.manifest import TensorSpec

PADDING = 256
"""Token id of padding; ids 0 to 255 are the bytes of the text."""

_EMBEDDING_SCALE = 0.02


def _sinusoids(length: int, size: int) -> Tensor:
    """Return sines and cosines of position over wavelengths from 2π to 10000·2π, [length, size]."""
    rates = torch.exp(torch.arange(0, size, 2) * (-math.log(10_000.0) / size))
    angles = torch.arange(length)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)[:, :size]


class TransformerEncoder(nn.Module):
    """Byte-level text classifier: tokens int64 [N, T], T ≤ max_length, 256 = padding -> logits [N, num_classes].

    Token and learned position embeddings, encoder blocks, mean over unmasked tokens, linear head. A row of padding
    alone pools to zeros, so its logits are the head's bias.
    """

    output_names: ClassVar[tuple[str, ...]] = ("logits",)

    def __init__(
        self,
        num_classes: int = 2,
        max_length: int = 192,
        embed_dim: int = 64,
        num_heads: int = 4,
        ff_dim: int = 128,
        num_blocks: int = 2,
        dropout: float = 0.1,
        norm_first: bool = True,
        causal: bool = False,
    ) -> None:
        super().__init__()
        positive("TransformerEncoder", num_classes=num_classes, max_length=max_length, embed_dim=embed_dim)
        positive("TransformerEncoder", num_heads=num_heads, ff_dim=ff_dim, num_blocks=num_blocks)
        probability("TransformerEncoder", dropout=dropout)
        self.max_length = max_length
        self.causal = causal
        self.token = nn.Embedding(PADDING + 1, embed_dim, padding_idx=PADDING)
        self.position = nn.Embedding(max_length, embed_dim)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            TransformerEncoderBlock(embed_dim, num_heads, ff_dim, dropout, norm_first) for _ in range(num_blocks)
        )
        self.norm = nn.LayerNorm(embed_dim) if norm_first else nn.Identity()
        self.head = nn.Linear(embed_dim, num_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw small normal token embeddings, as BERT's (Devlin et al. 2018): torch's unit normal drowns the residuals.

        Positions start as small sinusoids (Vaswani et al. 2017) and are learned from there: with little data, places
        that few texts reach keep a sensible value.
        """
        nn.init.normal_(self.token.weight, std=_EMBEDDING_SCALE)
        with torch.no_grad():
            self.token.weight[PADDING].zero_()
            self.position.weight.copy_(_EMBEDDING_SCALE * _sinusoids(*self.position.weight.shape))

    def input_specs(self) -> tuple[TensorSpec, ...]:
        """Return what `forward` takes, batch first."""
        length = self.max_length
        return (
            TensorSpec(
                name="tokens", datatype="INT64", shape=(-1, -1), range=(0, PADDING), pad=PADDING, max_length=length
            ),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Return unnormalised class scores. Raises ValueError for more tokens than `max_length`."""
        if not recording() and tokens.shape[1] > self.max_length:
            raise ValueError(
                f"TransformerEncoder: tokens must be at most {self.max_length} long, got {list(tokens.shape)}; cut them"
            )
        padding = tokens == PADDING
        x = self.dropout(self.token(tokens) + self.position(torch.arange(tokens.shape[1], device=tokens.device)))
        for block in self.blocks:
            x = block(x, key_padding_mask=padding, is_causal=self.causal)
        keep = (~padding).unsqueeze(-1).to(x.dtype)
        pooled = (self.norm(x) * keep).sum(dim=1) / keep.sum(dim=1).clamp(min=1.0)
        logits: Tensor = self.head(pooled)
        return logits
