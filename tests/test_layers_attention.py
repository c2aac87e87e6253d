"""MultiHeadAttention against torch's, and against plain loops over rows, heads and positions for every kind of mask."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from layercast.models.layers import AttentionWeights, MultiHeadAttention

N, T, S, D, H = 3, 5, 4, 12, 3  # as many rows as heads, so that a mask laid along the wrong one still broadcasts


def layer_of(seed: int = 0, heads: int = H, dropout: float = 0.0) -> MultiHeadAttention:
    """A layer whose biases aren't zero, so that none can be forgotten."""
    torch.manual_seed(seed)
    layer = MultiHeadAttention(D, heads, dropout)
    for name, parameter in layer.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return layer


def by_loops(layer: MultiHeadAttention, query: Tensor, memory: Tensor, bias: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Attention in float64, one query of one head of one row at a time; `bias` [N, H, T, S] may hold -inf."""
    state = {name: tensor.double().numpy() for name, tensor in layer.state_dict().items()}
    projected = {
        name: x.detach().double().numpy() @ state[f"{name}.weight"].T + state[f"{name}.bias"]
        for name, x in (("query", query), ("key", memory), ("value", memory))
    }
    size = D // layer.num_heads
    joined = np.zeros((len(query), query.shape[1], D))
    weights = np.zeros((len(query), layer.num_heads, query.shape[1], memory.shape[1]))
    for n, h, t in np.ndindex(weights.shape[:3]):
        part = slice(h * size, (h + 1) * size)
        scores = projected["key"][n, :, part] @ projected["query"][n, t, part] / math.sqrt(size)
        scores = scores + bias[n, h, t].double().numpy()
        if np.isneginf(scores).all():
            continue
        exps = np.exp(scores - scores.max())
        weights[n, h, t] = exps / exps.sum()
        joined[n, t, part] = weights[n, h, t] @ projected["value"][n, :, part]
    return joined @ state["out.weight"].T + state["out.bias"], weights


def assert_equal_to_loops(
    layer: MultiHeadAttention, query: Tensor, memory: Tensor, bias: Tensor, **masks: Tensor | bool
) -> None:
    output, weights = by_loops(layer, query, memory, bias.expand(N, layer.num_heads, query.shape[1], memory.shape[1]))
    got, got_weights = layer.attend(query, memory, **masks)  # type: ignore[arg-type]
    np.testing.assert_allclose(got.detach().numpy(), output, atol=2e-5)
    np.testing.assert_allclose(got_weights.detach().numpy(), weights, atol=1e-6)
    # Asked for or not, the weights change nothing.
    assert torch.equal(layer(query, memory, **masks), got)


SHAPES: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "2-D": ((T, S), lambda mask: mask[None, None]),
    "3-D": ((N, T, S), lambda mask: mask[:, None]),
    "4-D": ((N, H, T, S), lambda mask: mask),
}


class TestAgainstLoops:
    def test_without_a_mask(self) -> None:
        layer = layer_of()
        assert_equal_to_loops(layer, torch.randn(N, T, D), torch.randn(N, S, D), torch.zeros(1))

    @pytest.mark.parametrize("rank", SHAPES)
    def test_boolean_mask(self, rank: str) -> None:
        layer, (shape, spread) = layer_of(), SHAPES[rank]
        mask = torch.rand(shape) < 0.4
        bias = spread(torch.zeros(shape).masked_fill(mask, -math.inf))
        assert_equal_to_loops(layer, torch.randn(N, T, D), torch.randn(N, S, D), bias, attn_mask=mask)

    @pytest.mark.parametrize("rank", SHAPES)
    def test_additive_mask(self, rank: str) -> None:
        layer, (shape, spread) = layer_of(), SHAPES[rank]
        mask = torch.randn(shape).masked_fill(torch.rand(shape) < 0.3, -math.inf)
        assert_equal_to_loops(layer, torch.randn(N, T, D), torch.randn(N, S, D), spread(mask), attn_mask=mask)

    def test_key_padding_mask(self) -> None:
        layer = layer_of()
        mask = torch.tensor([[False] * 4, [False, True, False, True], [True, True, True, False]])
        bias = torch.zeros(N, 1, 1, S).masked_fill(mask[:, None, None], -math.inf)
        assert_equal_to_loops(layer, torch.randn(N, T, D), torch.randn(N, S, D), bias, key_padding_mask=mask)

    def test_causal(self) -> None:
        bias = torch.tensor([[0.0 if s <= t else -math.inf for s in range(T)] for t in range(T)])
        x = torch.randn(N, T, D)
        assert_equal_to_loops(layer_of(), x, x, bias, is_causal=True)

    def test_all_masks_at_once(self) -> None:
        layer, x = layer_of(), torch.randn(N, T, D)
        causal, padding = torch.full((T, T), -math.inf).triu(1), torch.zeros(N, T, dtype=torch.bool)
        padding[1, 3:] = padding[2, 0] = True
        additive = torch.randn(N, T, T) + causal
        bias = additive[:, None] + torch.zeros(N, 1, 1, T).masked_fill(padding[:, None, None], -math.inf)
        assert_equal_to_loops(layer, x, x, bias, attn_mask=additive, key_padding_mask=padding, is_causal=True)


class TestAgainstTorch:
    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("cross", [True, False])
    def test_weights_from_torch(self, training: bool, cross: bool) -> None:
        torch.manual_seed(1)
        theirs = nn.MultiheadAttention(D, H, batch_first=True).train(training)
        nn.init.normal_(theirs.in_proj_bias)
        nn.init.normal_(theirs.out_proj.bias)
        ours = MultiHeadAttention(D, H).train(training)
        ours.load_torch(theirs)
        query = torch.randn(N, T, D)
        memory = torch.randn(N, S, D) if cross else query
        mask, padding = torch.rand(T, memory.shape[1]) < 0.3, torch.rand(N, memory.shape[1]) < 0.3
        mask[:, 0] = padding[:, 0] = False  # no fully masked row: torch gives NaN there
        arguments = {"attn_mask": mask, "key_padding_mask": padding}
        expected, weights = theirs(query, memory, memory, average_attn_weights=False, **arguments)
        output, ours_weights = ours.attend(query, memory, memory, **arguments)
        torch.testing.assert_close(output, expected)
        torch.testing.assert_close(ours_weights, weights)

    def test_gradients(self) -> None:
        theirs = nn.MultiheadAttention(D, H, batch_first=True)
        ours = MultiHeadAttention(D, H)
        ours.load_torch(theirs)
        x, y = (torch.randn(N, T, D, generator=torch.Generator().manual_seed(2)).requires_grad_() for _ in range(2))
        ours(x).square().sum().backward()
        theirs(y, y, y, need_weights=False)[0].square().sum().backward()
        torch.testing.assert_close(x.grad, y.grad)
        joined = torch.cat([p.weight.grad for p in (ours.query, ours.key, ours.value) if p.weight.grad is not None])
        torch.testing.assert_close(joined, theirs.in_proj_weight.grad)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("training", [True, False])
    def test_weights_into_torch(self, training: bool, dtype: torch.dtype) -> None:
        ours = layer_of(dropout=0.25).to(dtype).train(training)
        theirs = ours.to_torch()
        assert (theirs.training, theirs.dropout, theirs.batch_first) == (training, 0.25, True)
        x = torch.randn(N, T, D, dtype=dtype)
        ours.eval()
        theirs.eval()
        torch.testing.assert_close(
            theirs(x, x, x)[0], ours(x), rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=1e-5
        )
        back = MultiHeadAttention(D, H).to(dtype)
        back.load_torch(theirs)
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), back.parameters(), strict=True))

    def test_dropout_is_on_the_weights(self) -> None:
        layer = layer_of(dropout=0.5)
        x, seen = torch.randn(N, T, D), []
        layer.dropout.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
        output, weights = layer.attend(x)
        before, after = seen[0]
        assert torch.equal(before, weights)
        kept = after != 0
        assert 0.2 < kept.float().mean().item() < 0.8
        torch.testing.assert_close(after[kept], 2 * before[kept])
        value = (x @ layer.value.weight.T + layer.value.bias).reshape(N, T, H, D // H).permute(0, 2, 1, 3)
        torch.testing.assert_close(output, layer.out((after @ value).permute(0, 2, 1, 3).reshape(N, T, D)))
        assert torch.equal(layer.eval()(x), layer(x))

    @pytest.mark.parametrize(
        "source",
        [
            nn.MultiheadAttention(D, H, bias=False),
            nn.MultiheadAttention(D, H, kdim=6, vdim=6),
            nn.MultiheadAttention(D, H, add_bias_kv=True),
            nn.MultiheadAttention(D, H, add_zero_attn=True),
        ],
    )
    def test_sources_that_compute_something_else_are_refused(self, source: nn.MultiheadAttention) -> None:
        with pytest.raises(ValueError, match="the source must have one embedding size, plain biases and no zero key"):
            MultiHeadAttention(D, H).load_torch(source)

    def test_source_of_other_size_is_refused(self) -> None:
        with pytest.raises(ValueError, match="want embed_dim 12 and 3 heads, got 12 and 4"):
            MultiHeadAttention(D, H).load_torch(nn.MultiheadAttention(D, 4))


class TestWeights:
    def test_sum_to_1_over_keys_that_are_not_masked(self) -> None:
        layer, padding = layer_of(), torch.tensor([[False] * T, [False, False, True, True, True], [False] + [True] * 4])
        _, weights = layer.attend(torch.randn(N, T, D), key_padding_mask=padding)
        assert weights.shape == (N, H, T, T)
        torch.testing.assert_close(weights.sum(-1), torch.ones(N, H, T))
        assert (weights.permute(0, 3, 1, 2)[padding] == 0).all()

    def test_a_hook_sees_them(self) -> None:
        layer, seen = layer_of(), []
        layer.weights.register_forward_hook(lambda module, _, output: seen.append((type(module), output)))
        _, weights = layer.attend(torch.randn(N, T, D))
        assert seen[0][0] is AttentionWeights
        assert torch.equal(seen[0][1], weights)

    def test_padding_is_as_if_the_keys_were_not_there(self) -> None:
        layer, query, memory = layer_of(), torch.randn(N, T, D), torch.randn(N, S, D)
        padding = torch.tensor([False, False, True, True]).expand(N, S)
        padded, shorter = layer(query, memory, key_padding_mask=padding), layer(query, memory[:, :2])
        torch.testing.assert_close(padded, shorter)


class TestArguments:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((10, 3), r"MultiHeadAttention: embed_dim \(10\) must be divisible by num_heads \(3\)"),
            ((0, 1), "MultiHeadAttention: embed_dim must be a positive whole number, got 0"),
            ((8, 0), "MultiHeadAttention: num_heads must be a positive whole number, got 0"),
            ((8, 2.0), "MultiHeadAttention: num_heads must be a positive whole number, got 2.0"),
            ((8, 2, -0.1), "MultiHeadAttention: dropout must be at least 0 and below 1, got -0.1"),
            ((8, 2, math.nan), "MultiHeadAttention: dropout must be at least 0 and below 1, got nan"),
        ],
    )
    def test_constructor(self, arguments: tuple[float, ...], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            MultiHeadAttention(*arguments)  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("masks", "message"),
        [
            ({"attn_mask": torch.zeros(T)}, r"attn_mask must be \[T, S\], \[N, T, S\] or \[N, H, T, S\], got \[5\]"),
            ({"attn_mask": torch.ones(T, T, dtype=torch.uint8)}, "attn_mask must be boolean or float, got torch.uint8"),
            ({"key_padding_mask": torch.zeros(N, T)}, r"key_padding_mask must be boolean \[N, S\] .*float32 \[3, 5\]"),
            ({"key_padding_mask": torch.zeros(T, dtype=torch.bool)}, r"key_padding_mask must be boolean \[N, S\]"),
        ],
    )
    def test_masks(self, masks: dict[str, Tensor], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            MultiHeadAttention(D, H)(torch.randn(N, T, D), **masks)

    @pytest.mark.parametrize("shape", [(T, D), (N, T, D + 1), (N, 1, T, D)])
    def test_tensors(self, shape: tuple[int, ...]) -> None:
        layer, x = MultiHeadAttention(D, 1), torch.randn(N, T, D)
        with pytest.raises(ValueError, match=r"MultiHeadAttention: query must be \[N, T, 12\], got \["):
            layer(torch.randn(shape))
        with pytest.raises(ValueError, match=r"MultiHeadAttention: key must be \[N, T, 12\], got \["):
            layer(x, torch.randn(shape), x)
        with pytest.raises(ValueError, match=r"MultiHeadAttention: value must be \[N, T, 12\], got \["):
            layer(x, x, torch.randn(shape))

    def test_non_contiguous_input(self) -> None:
        layer, x = layer_of(), torch.randn(N, D, T).transpose(1, 2)
        assert not x.is_contiguous()
        torch.testing.assert_close(layer(x), layer(x.contiguous()))

    def test_one_position_and_one_row(self) -> None:
        layer, x = layer_of(), torch.randn(1, 1, D)
        value = x @ layer.value.weight.T + layer.value.bias
        torch.testing.assert_close(layer(x), value @ layer.out.weight.T + layer.out.bias)
