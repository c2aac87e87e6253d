"""Attention that is not ours, in a file of its own for servers to import: torch's encoder, and a Hugging Face BERT."""

import torch
from torch import nn
from transformers import BertConfig, BertModel

PADDING = 0


class TorchEncoder(nn.Module):
    """Tokens [N, T], 0 is padding -> logits [N, 2], through torch's own TransformerEncoder."""

    def __init__(self, norm_first: bool = False, batch_first: bool = True) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.token = nn.Embedding(100, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, norm_first=norm_first, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 2)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.token(tokens)
        padding = tokens == PADDING
        if self.batch_first:
            return self.head(self.encoder(x, src_key_padding_mask=padding)[:, 0])
        return self.head(self.encoder(x.transpose(0, 1), src_key_padding_mask=padding)[0])


class Bert(nn.Module):
    """Tokens [N, T], 0 is padding -> pooled [N, 16]; `attention` is how transformers computes it: eager or sdpa."""

    def __init__(self, attention: str) -> None:
        super().__init__()
        self.bert = BertModel(
            BertConfig(
                vocab_size=100,
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=32,
                max_position_embeddings=16,
                attn_implementation=attention,
            )
        )

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.bert(input_ids=tokens, attention_mask=(tokens != PADDING).long()).pooler_output
