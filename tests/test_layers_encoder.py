"""TransformerEncoderBlock against nn.TransformerEncoderLayer with copied weights."""

import math

import pytest
import torch
from torch import Tensor, nn

from layercast.models.layers import TransformerEncoderBlock

N, T, D, H, FF = 2, 6, 16, 4, 24


def pair(norm_first: bool, dropout: float = 0.0) -> tuple[TransformerEncoderBlock, nn.TransformerEncoderLayer]:
    """Ours and torch's with the same random weights, norms and biases included."""
    torch.manual_seed(0)
    theirs = nn.TransformerEncoderLayer(D, H, FF, dropout, "gelu", batch_first=True, norm_first=norm_first)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours = TransformerEncoderBlock(D, H, FF, dropout, norm_first)
    ours.attn.load_torch(theirs.self_attn)
    for mine, other in (
        (ours.norm1, theirs.norm1),
        (ours.norm2, theirs.norm2),
        (ours.ff[0], theirs.linear1),
        (ours.ff[3], theirs.linear2),
    ):
        mine.load_state_dict(other.state_dict())
    return ours, theirs


CAUSAL = torch.ones(T, T, dtype=torch.bool).triu(1)
PADDING = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
MASKS: dict[str, tuple[dict[str, Tensor | bool], dict[str, Tensor]]] = {
    "none": ({}, {}),
    "boolean": ({"attn_mask": CAUSAL}, {"src_mask": CAUSAL}),
    "causal": ({"is_causal": True}, {"src_mask": CAUSAL}),
    "additive": (
        {"attn_mask": torch.linspace(-2, 2, T * T).view(T, T)},
        {"src_mask": torch.linspace(-2, 2, T * T).view(T, T)},
    ),
    "padding": ({"key_padding_mask": PADDING}, {"src_key_padding_mask": PADDING}),
    "causal and padding": (
        {"is_causal": True, "key_padding_mask": PADDING},
        {"src_mask": CAUSAL, "src_key_padding_mask": PADDING},
    ),
}


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("mode", ["train", "eval", "inference"])
def test_equals_torchs_layer(norm_first: bool, mask: str, mode: str) -> None:
    ours, theirs = pair(norm_first)
    ours.train(mode == "train")
    theirs.train(mode == "train")
    mine, other = MASKS[mask]
    x = torch.randn(N, T, D)
    # Under inference mode torch takes its fused path, which reads a float mask as a boolean one and answers NaN.
    with torch.inference_mode(mode == "inference" and mask != "additive"):
        got, expected = ours(x, **mine), theirs(x, **other)
    kept = ~PADDING if "padding" in mask else torch.ones(N, T, dtype=torch.bool)
    assert got.shape == (N, T, D)
    torch.testing.assert_close(got[kept], expected[kept], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("norm_first", [False, True])
def test_gradients_equal_torchs(norm_first: bool) -> None:
    ours, theirs = pair(norm_first)
    x = torch.randn(N, T, D)
    weights = torch.randn(N, T, D)
    (ours(x, is_causal=True) * weights).sum().backward()
    (theirs(x, CAUSAL) * weights).sum().backward()
    for mine, other in (
        (ours.norm1.weight, theirs.norm1.weight),
        (ours.ff[0].weight, theirs.linear1.weight),
        (ours.ff[3].bias, theirs.linear2.bias),
        (ours.attn.out.weight, theirs.self_attn.out_proj.weight),
    ):
        torch.testing.assert_close(mine.grad, other.grad, atol=1e-4, rtol=1e-4)


def test_the_two_norms_differ() -> None:
    post, pre = TransformerEncoderBlock(D, H, FF), TransformerEncoderBlock(D, H, FF, norm_first=True)
    pre.load_state_dict(post.state_dict())
    x = torch.randn(N, T, D) * 3
    after_post, after_pre = post.eval()(x), pre.eval()(x)
    # Post-norm ends in a LayerNorm with weight 1 and bias 0, pre-norm in a sum.
    torch.testing.assert_close(after_post.mean(-1), torch.zeros(N, T), atol=1e-5, rtol=0)
    torch.testing.assert_close(after_post.var(-1, unbiased=False), torch.ones(N, T), atol=1e-3, rtol=0)
    assert after_pre.var(-1).mean() > 3


@pytest.mark.parametrize("norm_first", [False, True])
def test_padding_and_mode_change_nothing_at_the_other_positions(norm_first: bool) -> None:
    block, _ = pair(norm_first)
    x, changed = torch.randn(N, T, D), torch.randn(N, T, D)
    changed[~PADDING] = x[~PADDING]
    alone = block(x[1:, :4])
    for mode in (True, False):
        block.train(mode)
        first, second = block(x, key_padding_mask=PADDING), block(changed, key_padding_mask=PADDING)
        torch.testing.assert_close(first[~PADDING], second[~PADDING])
        torch.testing.assert_close(first[1:, :4], alone)


@pytest.mark.parametrize("norm_first", [False, True])
def test_causal_block_never_looks_ahead(norm_first: bool) -> None:
    block, _ = pair(norm_first)
    x = torch.randn(1, T, D)
    for t in range(T - 1):
        changed = x.clone()
        changed[:, t + 1 :] += 5
        torch.testing.assert_close(
            block(changed, is_causal=True)[:, : t + 1], block(x, is_causal=True)[:, : t + 1], rtol=0, atol=1e-6
        )


@pytest.mark.parametrize("norm_first", [False, True])
def test_fully_masked_row_has_finite_gradients(norm_first: bool) -> None:
    block, _ = pair(norm_first)
    x = torch.randn(N, T, D, requires_grad=True)
    padding = torch.tensor([[True] * T, [False] * T])
    output = block(x, key_padding_mask=padding)
    torch.testing.assert_close(output[1:], block(x[1:]))
    output.square().sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())


@pytest.mark.parametrize("norm_first", [False, True])
def test_dropout_acts_at_all_four_places_and_in_training_only(norm_first: bool) -> None:
    block = TransformerEncoderBlock(D, H, FF, 0.3, norm_first)
    assert [name for name, module in block.named_modules() if isinstance(module, nn.Dropout) and module.p == 0.3] == [
        "attn.dropout",
        "attn_dropout",
        "ff.2",
        "ff.4",
    ]
    zeroed: dict[str, float] = {}
    for name, module in block.named_modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_hook(
                lambda _, inputs, output, name=name: zeroed.__setitem__(
                    name, ((output == 0) & (inputs[0] != 0)).float().mean().item()
                )
            )
    x = torch.randn(8, T, D)
    block(x)
    assert len(zeroed) == 4
    assert all(0.15 < share < 0.45 for share in zeroed.values())
    block.eval()
    assert torch.equal(block(x), block(x))
    assert set(zeroed.values()) == {0.0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((16, 4, 0), "TransformerEncoderBlock: ff_dim must be a positive whole number, got 0"),
        ((0, 4, 8), "TransformerEncoderBlock: embed_dim must be a positive whole number, got 0"),
        ((16, -4, 8), "TransformerEncoderBlock: num_heads must be a positive whole number, got -4"),
        ((16, 3, 8), r"embed_dim \(16\) must be divisible by num_heads \(3\)"),
        ((16, 4, 8, 1.0), "TransformerEncoderBlock: dropout must be at least 0 and below 1, got 1.0"),
        ((16, 4, 8, math.nan), "TransformerEncoderBlock: dropout must be at least 0"),
    ],
)
def test_constructor_arguments_are_validated(arguments: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TransformerEncoderBlock(*arguments)  # type: ignore[arg-type]
