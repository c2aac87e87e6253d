"""TransformerEncoder against the same classifier on torch's encoder layers."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layercast.models.architectures.transformer import TransformerEncoder


def texts(rows: int, length: int = 12) -> Tensor:
    """Rows of random bytes, each with another number of paddings at its end."""
    tokens = torch.randint(0, 256, (rows, length))
    for row in range(rows):
        tokens[row, length - row % length :] = 256
    return tokens


def torch_encoder(model: TransformerEncoder, tokens: Tensor, norm_first: bool, causal: bool) -> Tensor:
    """The same classifier on torch's encoder layers."""
    padding = tokens == 256
    x = model.token.weight[tokens] + model.position.weight[: tokens.shape[1]]
    mask = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).triu(1) if causal else None
    for block in model.blocks:
        layer = nn.TransformerEncoderLayer(64, 4, 128, 0.0, "gelu", batch_first=True, norm_first=norm_first)
        layer.self_attn = block.attn.to_torch()
        layer.linear1, layer.linear2, layer.norm1, layer.norm2 = block.ff[0], block.ff[3], block.norm1, block.norm2
        x = layer(x, mask, padding)
    if norm_first:
        x = F.layer_norm(x, (64,), model.norm.weight, model.norm.bias)
    means = [row[~hidden].mean(0) for row, hidden in zip(x, padding, strict=True)]
    return torch.stack(means) @ model.head.weight.T + model.head.bias


class TestTransformerEncoder:
    @pytest.mark.parametrize("norm_first", [True, False])
    @pytest.mark.parametrize("causal", [True, False])
    def test_equals_torchs_encoder_layers(self, norm_first: bool, causal: bool) -> None:
        torch.manual_seed(0)
        model, tokens = TransformerEncoder(norm_first=norm_first, causal=causal, dropout=0.0), texts(4)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2)
        torch.testing.assert_close(
            model(tokens), torch_encoder(model, tokens, norm_first, causal), atol=1e-4, rtol=1e-4
        )

    def test_more_padding_changes_nothing(self) -> None:
        model = TransformerEncoder().eval()
        tokens = torch.randint(0, 256, (2, 10))
        padded = F.pad(tokens, (0, 30), value=256)
        torch.testing.assert_close(model(padded), model(tokens))

    def test_other_tokens_and_their_order_do_change_it(self) -> None:
        model = TransformerEncoder().eval()
        tokens = torch.arange(65, 75)[None]
        assert not torch.allclose(model(tokens), model(tokens.flip(1)), atol=1e-5)
        assert not torch.allclose(model(tokens), model(tokens + 1), atol=1e-5)

    def test_row_of_padding_alone_gives_the_heads_bias(self) -> None:
        model = TransformerEncoder().eval()
        tokens = torch.full((2, 5), 256)
        tokens[1] = 65
        logits = model(tokens)
        torch.testing.assert_close(logits[0], model.head.bias)
        logits.square().sum().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        assert (model.token.weight.grad[256] == 0).all()

    @pytest.mark.parametrize("norm_first", [True, False])
    def test_causal_positions_do_not_see_later_ones(self, norm_first: bool) -> None:
        model, states = TransformerEncoder(norm_first=norm_first, causal=True).eval(), []
        model.blocks[-1].register_forward_hook(lambda _, __, output: states.append(output))
        tokens = torch.randint(0, 256, (1, 8))
        changed = tokens.clone()
        changed[:, 5:] = (changed[:, 5:] + 7) % 256
        model(tokens)
        model(changed)
        torch.testing.assert_close(states[0][:, :5], states[1][:, :5], rtol=0, atol=1e-6)
        assert not torch.allclose(states[0][:, 5:], states[1][:, 5:])

    def test_longest_text_is_accepted_and_a_longer_one_refused_with_the_limit(self) -> None:
        model = TransformerEncoder(max_length=6).eval()
        assert model(torch.zeros(1, 6, dtype=torch.int64)).shape == (1, 2)
        with pytest.raises(ValueError, match=r"tokens must be at most 6 long, got \[1, 7\]; cut them"):
            model(torch.zeros(1, 7, dtype=torch.int64))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_with_padding(self, dtype: torch.dtype) -> None:
        model, tokens = TransformerEncoder().eval(), texts(4)
        with torch.autocast("cpu", dtype):
            logits = model(tokens)
        torch.testing.assert_close(logits.float(), model(tokens), rtol=0, atol=1e-2)

    def test_padding_embedding_starts_at_zero_and_stays(self) -> None:
        model = TransformerEncoder(dropout=0.0)
        assert (model.token.weight[256] == 0).all()
        optimiser = torch.optim.SGD(model.parameters(), 0.1)
        model(texts(3)).sum().backward()
        optimiser.step()
        assert (model.token.weight[256] == 0).all()
