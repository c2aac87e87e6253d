"""Attention maps against softmax(q·kᵀ) from the module's own weights, and rollout by hand."""

import math

import pytest
import torch
from torch import nn

from layercast.models.attention_maps import AttentionExtractor, rollout
from layercast.models.explain import explain
from layercast.models.hooks import LayerError, registered_hooks
from layercast.models.layers.attention import MultiHeadAttention, TransformerEncoderBlock
from layercast.models.registry import build

PADDING = torch.tensor([[False] * 5, [False, False, True, True, True], [True] * 5])


@torch.no_grad()
def by_hand(x, query, key, heads, hidden=None):
    """[N, H, T, T] from the projections' (weight, bias); rows without any key are zero."""
    n, t, d = x.shape

    def split(projection):
        weight, bias = projection
        return (x @ weight.T + bias).reshape(n, t, heads, d // heads).transpose(1, 2)

    scores = split(query) @ split(key).transpose(2, 3) / math.sqrt(d // heads)
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.inf)
    return scores.softmax(dim=-1).nan_to_num(nan=0.0)


def of_ours(module, x, hidden=None):
    pairs = [(p.weight, p.bias) for p in (module.query, module.key)]
    return by_hand(x, *pairs, module.num_heads, hidden)


def of_torchs(module, x, hidden=None):
    weights, biases = module.in_proj_weight.chunk(3), module.in_proj_bias.chunk(3)
    return by_hand(x, (weights[0], biases[0]), (weights[1], biases[1]), module.num_heads, hidden)


@pytest.fixture(autouse=True)
def seeded(one_thread):
    torch.manual_seed(0)


def check_maps(maps, padding):
    rows = maps.sum(dim=-1)
    torch.testing.assert_close(rows[:2], torch.ones_like(rows[:2]))
    assert not maps[padding[:, None, None].expand_as(maps)].any()


@pytest.mark.parametrize("causal", [False, True])
def test_our_attention(causal):
    module, x = TransformerEncoderBlock(8, 2, 16).eval(), torch.randn(3, 5, 8)
    plain = module(x, key_padding_mask=PADDING, is_causal=causal)
    with AttentionExtractor(module) as attention:
        output = module(x, key_padding_mask=PADDING, is_causal=causal)
    hidden = PADDING[:, None, None] | (torch.ones(5, 5).triu(1).bool() & torch.tensor(causal))
    assert list(attention.maps) == ["attn"]
    torch.testing.assert_close(attention.maps["attn"], of_ours(module.attn, x, hidden))
    torch.testing.assert_close(attention.averaged()["attn"], of_ours(module.attn, x, hidden).mean(dim=1))
    check_maps(attention.maps["attn"], PADDING)
    assert torch.equal(output, plain)
    assert not attention.maps["attn"].requires_grad
    assert registered_hooks(module) == []


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # torch's fused path warns of what it uses
@pytest.mark.parametrize("batch_first", [True, False])
def test_torchs_attention_inside_its_encoder(batch_first):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=batch_first).eval()
    x = torch.randn(2, 5, 8)
    given = x if batch_first else x.transpose(0, 1)
    with torch.inference_mode():
        plain = encoder(given, src_key_padding_mask=PADDING[:2])
        with AttentionExtractor(encoder) as attention:
            output = encoder(given, src_key_padding_mask=PADDING[:2])
        second = encoder.layers[0](given, src_key_padding_mask=PADDING[:2])
    assert list(attention.maps) == ["layers.0.self_attn", "layers.1.self_attn"]
    hidden = PADDING[:2, None, None]
    torch.testing.assert_close(attention.maps["layers.0.self_attn"], of_torchs(encoder.layers[0].self_attn, x, hidden))
    second = second if batch_first else second.transpose(0, 1)
    keep = ~PADDING[:2, None, :, None].expand(2, 2, 5, 5)  # queries that are padding differ on torch's fused path
    got, wanted = attention.maps["layers.1.self_attn"], of_torchs(encoder.layers[1].self_attn, second, hidden)
    torch.testing.assert_close(got[keep], wanted[keep])
    check_maps(got, PADDING[:2])
    real = ~PADDING[:2] if batch_first else ~PADDING[:2].T
    torch.testing.assert_close(output[real], plain[real], atol=1e-5, rtol=1e-5)
    assert torch.backends.mha.get_fastpath_enabled()
    assert registered_hooks(encoder) == []


def test_torchs_attention_by_itself_returns_what_it_did():
    module, x = nn.MultiheadAttention(8, 2, batch_first=True).eval(), torch.randn(3, 5, 8)
    for given in ({}, {"need_weights": False}, {"average_attn_weights": False}):
        plain = module(x, x, x, PADDING, **given)
        with AttentionExtractor(module) as attention:
            output = module(x, x, x, PADDING, **given)
        assert torch.equal(output[0].nan_to_num(), plain[0].nan_to_num())
        assert (output[1] is None) == (plain[1] is None)
        (got,) = attention.maps.values()
        torch.testing.assert_close(got, of_torchs(module, x, PADDING[:, None, None]))
        check_maps(got, PADDING)


def test_layers_are_chosen_by_pattern_and_told_when_there_are_none():
    model, tokens = build("TransformerEncoder", num_blocks=3).eval(), torch.randint(0, 256, (2, 5))
    with torch.inference_mode(), AttentionExtractor(model, ["blocks.2.*", "blocks.0.attn"]) as attention:
        model(tokens)
        assert attention.maps["blocks.2.attn"].shape == (2, 4, 5, 5)
    assert list(attention.maps) == ["blocks.0.attn", "blocks.2.attn"]
    with pytest.raises(LayerError, match=r"no attention layer matches 'blocks.3.attn'; nearest: blocks"):
        AttentionExtractor(model, "blocks.3.attn")
    with pytest.raises(LayerError, match=r"Linear has no attention layer: none of its modules is .*MultiheadAttention"):
        AttentionExtractor(nn.Linear(2, 2))


def test_hooks_go_with_an_error():
    model = TransformerEncoderBlock(8, 2, 16).eval()
    with pytest.raises(ValueError, match="must be"), AttentionExtractor(model):
        model.attn(torch.zeros(3))
    assert registered_hooks(model) == []
    assert torch.backends.mha.get_fastpath_enabled()


def test_calls_of_one_layer_are_told_apart():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = MultiHeadAttention(8, 2)

        def forward(self, x):
            return self.attn(self.attn(x))

    model, x = Twice().eval(), torch.randn(1, 4, 8)
    first = model.attn(x)
    with AttentionExtractor(model, "attn#1") as attention, AttentionExtractor(model, "type:MultiHead*") as both:
        model(x)
    assert list(attention.maps) == ["attn#1"]
    assert list(both.maps) == ["attn#0", "attn#1"]
    torch.testing.assert_close(both.maps["attn#1"], of_ours(model.attn, first))


def test_rollout_by_hand():
    one = torch.tensor([[[[1.0, 0.0], [0.5, 0.5]], [[0.0, 1.0], [0.5, 0.5]]]])  # the heads' mean is all 0.5
    two = torch.tensor([[[[1.0, 0.0], [1.0, 0.0]]]])
    wanted = torch.tensor([[1.0, 0.0], [0.5, 0.5]]) @ torch.tensor([[0.75, 0.25], [0.25, 0.75]])
    torch.testing.assert_close(rollout([one, two]), wanted[None])
    torch.testing.assert_close(rollout([one, two], residual=0.0), torch.full((1, 2, 2), 0.5))
    torch.testing.assert_close(rollout([two, one], residual=1.0), torch.eye(2)[None])


def test_rollout_leaves_out_padding_that_the_model_looks_at():
    maps, mask = torch.full((1, 1, 3, 3), 1 / 3), torch.tensor([[True, True, False]])
    once = torch.tensor([[0.8, 0.2, 0.0], [0.2, 0.8, 0.0], [0.0, 0.0, 0.0]])  # (1/2 + 1/6, 1/6) over their sum
    torch.testing.assert_close(rollout([maps], mask), once[None])
    torch.testing.assert_close(rollout([maps, maps], mask), (once @ once)[None])


def test_rollout_leaves_padding_out():
    model = build("TransformerEncoder", max_length=8, embed_dim=8, num_heads=2, ff_dim=16).eval()
    tokens = torch.randint(0, 256, (3, 6))
    tokens[1, 4:] = tokens[2] = 256
    with torch.inference_mode(), AttentionExtractor(model) as attention:
        model(tokens)
        joined = rollout(list(attention.maps.values()), tokens != 256)
        model(tokens[1:2, :4])
        alone = rollout(list(attention.maps.values()))
    torch.testing.assert_close(joined[1, :4, :4], alone[0])
    torch.testing.assert_close(joined.sum(dim=-1), (tokens != 256).float())
    assert not joined[2].any()
    assert not joined[1, :, 4:].any()
    got = explain(model, tokens, "attention-rollout")
    torch.testing.assert_close(got.attributions[1, :4], alone[0].mean(dim=0))
    torch.testing.assert_close(explain(model, tokens, "attention-rollout", pool="cls").attributions, joined[:, 0])
    last = explain(model, tokens, "attention-rollout", layer="blocks.1.*", pool="last", residual=0.25).attributions
    with torch.inference_mode(), AttentionExtractor(model, "blocks.1.attn") as attention:
        model(tokens)
    single = 0.25 * torch.eye(6) + 0.75 * attention.averaged()["blocks.1.attn"]
    torch.testing.assert_close(last[:2], torch.stack([single[0, 5], single[1, 3]]))


@pytest.mark.parametrize(
    ("maps", "options", "message"),
    [
        ([], {}, "at least one attention map"),
        ([torch.rand(1, 2, 3, 4)], {}, r"want maps of self-attention of one shape, .* got \[1, 2, 3, 4\]"),
        ([torch.rand(1, 2, 3, 3), torch.rand(1, 2, 4, 4)], {}, "of one shape"),
        ([torch.rand(1, 2, 3, 3)], {"residual": 1.5}, "residual must be between 0 and 1"),
        ([torch.rand(1, 2, 3, 3)], {"token_mask": torch.ones(1, 4).bool()}, r"boolean \[1, 3\], got"),
    ],
)
def test_what_rolls_not_is_refused(maps, options, message):
    with pytest.raises(ValueError, match=message):
        rollout(maps, **options)
