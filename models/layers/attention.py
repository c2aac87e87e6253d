"""Multi-head attention and the transformer encoder block, written out (Vaswani et al. 2017)."""

import math

import torch
from torch import Tensor, nn

from layercast.models.layers.checks import divides, positive, probability, recording


class AttentionWeights(nn.Module):
    """Softmax over keys that gives zeros, not NaN, to a query that may attend to nothing.

    [N, H, T, S] scores and a boolean mask (True = may not attend) -> [N, H, T, S] weights. A module of its own, so
    that a hook on it sees the attention maps.
    """

    def forward(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the weights; rows that `mask` hides entirely are zero and pass no gradient."""
        if mask is None:
            return scores.softmax(dim=-1)
        # The dtype's own minimum, not -inf: a row of -inf makes NaN gradients even where its output is replaced.
        scores = scores.masked_fill(mask, torch.finfo(scores.dtype).min)
        return scores.softmax(dim=-1).masked_fill(mask, 0.0)


class MultiHeadAttention(nn.Module):
    """Scaled dot-product attention in `num_heads` heads: query [N, T, D], key and value [N, S, D] -> [N, T, D].

    Masks: `attn_mask` is [T, S], [N, T, S] or [N, H, T, S], boolean (True = may not attend) or additive float, where
    the lowest number of the scores' dtype or less hides as -inf does (in half precision, -1e9 is such a number);
    `key_padding_mask` is [N, S] boolean (True = padding). A query that may attend to nothing gets zeros before the
    output projection.

    `is_causal` is enforced, not a hint: query t attends to keys ≤ t. It goes with any padding mask, and with an
    `attn_mask` that hides every later key itself; one that permits a later key (False, or a bias whose exponential is
    not 0) contradicts it and raises ValueError. A trace or an export can't look at values: there the two are joined,
    so that the recorded program is causal whatever mask it is given.
    """

    def __init__(self, embed_dim: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        positive("MultiHeadAttention", embed_dim=embed_dim, num_heads=num_heads)
        divides("MultiHeadAttention", "embed_dim", embed_dim, "num_heads", num_heads)
        probability("MultiHeadAttention", dropout=dropout)
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.query = nn.Linear(embed_dim, embed_dim)
        self.key = nn.Linear(embed_dim, embed_dim)
        self.value = nn.Linear(embed_dim, embed_dim)
        self.weights = AttentionWeights()
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(embed_dim, embed_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform projections and zero biases, much as torch's MultiheadAttention."""
        for projection in (self.query, self.key, self.value):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)
        nn.init.zeros_(self.out.bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        attn_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Return the attended values, [N, T, D]. `key` and `value` default to `query` (self-attention)."""
        output, _ = self.attend(query, key, value, attn_mask, key_padding_mask, is_causal)
        return output

    def attend(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        attn_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Return (output [N, T, D], weights [N, H, T, S]); the weights are those before dropout."""
        key = query if key is None else key
        value = key if value is None else value
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            self._check(name, tensor)
        q, k, v = self._split(self.query(query)), self._split(self.key(key)), self._split(self.value(value))
        # Scaled before the product, which could overflow half precision.
        scores = (q / math.sqrt(self.head_dim)) @ k.transpose(-2, -1)
        scores, mask = self._masked(scores, attn_mask, key_padding_mask, is_causal)
        weights: Tensor = self.weights(scores, mask)
        attended = self.dropout(weights) @ v
        return self.out(attended.transpose(1, 2).flatten(2)), weights

    def _check(self, name: str, tensor: Tensor) -> None:
        if tensor.dim() != 3 or (not recording() and tensor.shape[2] != self.embed_dim):
            raise ValueError(f"MultiHeadAttention: {name} must be [N, T, {self.embed_dim}], got {list(tensor.shape)}")

    def _split(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], x.shape[1], self.num_heads, self.head_dim).transpose(1, 2)

    def _masked(
        self, scores: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None, is_causal: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Add an additive mask to `scores` and join all boolean ones into a single mask that broadcasts over them."""
        masks: list[Tensor] = []
        if attn_mask is not None:
            attn_mask = self._broadcast(attn_mask)
            if attn_mask.dtype == torch.bool:
                masks.append(attn_mask)
            else:
                hidden = attn_mask <= torch.finfo(scores.dtype).min
                masks.append(hidden)
                scores = scores + attn_mask.masked_fill(hidden, 0.0).to(scores.dtype)
        if key_padding_mask is not None:
            if key_padding_mask.dtype != torch.bool or key_padding_mask.dim() != 2:
                raise ValueError(
                    "MultiHeadAttention: key_padding_mask must be boolean [N, S] (True = padding), "
                    f"got {key_padding_mask.dtype} {list(key_padding_mask.shape)}"
                )
            masks.append(key_padding_mask[:, None, None, :])
        if is_causal:
            ones = torch.ones(scores.shape[-2], scores.shape[-1], dtype=torch.bool, device=scores.device)
            later = ones.triu(diagonal=1)
            if attn_mask is not None:
                self._refuse_contradiction(attn_mask, later)
            masks.append(later)
        mask = masks[0] if masks else None
        for other in masks[1:]:
            mask = other if mask is None else mask | other
        return scores, mask

    @staticmethod
    def _refuse_contradiction(attn_mask: Tensor, later: Tensor) -> None:
        """Raise ValueError when `attn_mask`, broadcast to four dimensions, permits a key that is `later`."""
        if recording() or attn_mask.is_meta:
            return
        permitted = ~attn_mask if attn_mask.dtype == torch.bool else attn_mask.float().exp() > 0
        wrong = (permitted & later).nonzero()
        if len(wrong):
            query, key = wrong[0, -2:].tolist()
            raise ValueError(
                f"MultiHeadAttention: is_causal contradicts attn_mask, which lets query {query} attend to the later "
                f"key {key}; hide later keys in the mask too (torch.ones(T, S, dtype=torch.bool).triu(1) hides just "
                "them), pass padding as key_padding_mask, or leave is_causal out"
            )

    def _broadcast(self, mask: Tensor) -> Tensor:
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise ValueError(
                f"MultiHeadAttention: attn_mask must be boolean or float, got {mask.dtype}; pass mask.bool()"
            )
        if mask.dim() == 2:
            return mask
        if mask.dim() == 3:
            return mask[:, None]
        if mask.dim() == 4:
            return mask
        raise ValueError(
            f"MultiHeadAttention: attn_mask must be [T, S], [N, T, S] or [N, H, T, S], got {list(mask.shape)}"
        )

    @torch.no_grad()
    def load_torch(self, source: nn.MultiheadAttention) -> None:
        """Copy the weights of a torch MultiheadAttention with one embedding size and biases."""
        plain = source.in_proj_weight is not None and source.in_proj_bias is not None and source.bias_k is None
        if not plain or source.add_zero_attn:
            raise ValueError(
                "MultiHeadAttention: the source must have one embedding size, plain biases and no zero key"
            )
        if source.embed_dim != self.embed_dim or source.num_heads != self.num_heads:
            raise ValueError(
                f"MultiHeadAttention: want embed_dim {self.embed_dim} and {self.num_heads} heads, "
                f"got {source.embed_dim} and {source.num_heads}"
            )
        for index, projection in enumerate((self.query, self.key, self.value)):
            projection.weight.copy_(source.in_proj_weight.chunk(3)[index])
            projection.bias.copy_(source.in_proj_bias.chunk(3)[index])
        self.out.weight.copy_(source.out_proj.weight)
        self.out.bias.copy_(source.out_proj.bias)

    @torch.no_grad()
    def to_torch(self) -> nn.MultiheadAttention:
        """Return a torch MultiheadAttention (batch first) with this layer's weights, dropout and mode."""
        target = nn.MultiheadAttention(self.embed_dim, self.num_heads, dropout=self.dropout.p, batch_first=True)
        target.to(self.out.weight.device, self.out.weight.dtype)
        projections = (self.query, self.key, self.value)
        target.in_proj_weight.copy_(torch.cat([p.weight for p in projections]))
        target.in_proj_bias.copy_(torch.cat([p.bias for p in projections]))
        target.out_proj.weight.copy_(self.out.weight)
        target.out_proj.bias.copy_(self.out.bias)
        return target.train(self.training)


class TransformerEncoderBlock(nn.Module):
    """Self-attention and a GELU feed-forward, each with a residual and a LayerNorm: [N, T, D] -> [N, T, D].

    `norm_first=False` is post-norm (Vaswani et al. 2017), True is pre-norm (Xiong et al. 2020).
    """

    def __init__(
        self, embed_dim: int, num_heads: int, ff_dim: int, dropout: float = 0.1, norm_first: bool = False
    ) -> None:
        super().__init__()
        positive("TransformerEncoderBlock", embed_dim=embed_dim, num_heads=num_heads, ff_dim=ff_dim)
        probability("TransformerEncoderBlock", dropout=dropout)
        self.norm_first = norm_first
        self.attn = MultiHeadAttention(embed_dim, num_heads, dropout)
        self.attn_dropout = nn.Dropout(dropout)
        self.norm1 = nn.LayerNorm(embed_dim)
        self.ff = nn.Sequential(
            nn.Linear(embed_dim, ff_dim),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(ff_dim, embed_dim),
            nn.Dropout(dropout),
        )
        self.norm2 = nn.LayerNorm(embed_dim)

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Return the encoded tokens; masks as in MultiHeadAttention."""
        if self.norm_first:
            normed = self.norm1(x)
            attended = self.attn(normed, attn_mask=attn_mask, key_padding_mask=key_padding_mask, is_causal=is_causal)
            x = x + self.attn_dropout(attended)
            unnormed: Tensor = x + self.ff(self.norm2(x))
            return unnormed
        attended = self.attn(x, attn_mask=attn_mask, key_padding_mask=key_padding_mask, is_causal=is_causal)
        x = self.norm1(x + self.attn_dropout(attended))
        encoded: Tensor = self.norm2(x + self.ff(x))
        return encoded
