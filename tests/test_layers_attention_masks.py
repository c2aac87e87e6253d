"""What MultiHeadAttention promises of masks: causality, rows that see nothing, half precision."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from test_layers_attention import D, H, N, T, layer_of
from torch import Tensor, nn

from layercast.models.layers import MultiHeadAttention, TransformerEncoderBlock

LATER = torch.ones(T, T, dtype=torch.bool).triu(1)


def biases(mask: Tensor, lowest: float) -> Tensor:
    return torch.linspace(-3, 3, T * T).view(T, T).masked_fill(mask, lowest)


AGREEING: dict[str, dict[str, Tensor]] = {
    "none": {},
    "causal": {"attn_mask": LATER},
    "a window": {"attn_mask": LATER | torch.ones(T, T, dtype=torch.bool).tril(-2)},
    "causal 3-D": {"attn_mask": LATER.expand(1, T, T)},
    "causal 4-D": {"attn_mask": LATER.expand(1, H, T, T)},
    "additive": {"attn_mask": biases(LATER, -math.inf)},
    "additive, lowest float": {"attn_mask": biases(LATER, torch.finfo(torch.float32).min)},
    "additive, -1e9": {"attn_mask": biases(LATER, -1e9)},
    "additive, -1e4": {"attn_mask": biases(LATER, -1e4)},
    "padding": {"key_padding_mask": torch.tensor([[False, True, False, False, False]])},
    "padding alone": {"key_padding_mask": torch.ones(1, T, dtype=torch.bool)},
}
ONE = LATER & (torch.arange(T) != 3).expand(T, T).logical_or(torch.arange(T)[:, None] != 1)  # but query 1 sees key 3
CONTRADICTING = {
    "nothing hidden": torch.zeros(T, T, dtype=torch.bool),
    "one later key": ONE,
    "the past": LATER.T,
    "one row": torch.stack((LATER, ONE)),
    "one head": torch.stack((LATER, LATER, ONE))[None].expand(2, H, T, T),
    "a bias": torch.zeros(T, T),
    "a bias at one later key": biases(LATER, -math.inf).masked_fill(LATER & ~ONE, -50.0),
    "padding over all queries": torch.tensor([False] * 4 + [True]).expand(2, 1, 1, T),
}


class AsksForBoth(nn.Module):
    """What an exporter records: it can't look at the values of the mask."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = layer_of()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        attended: Tensor = self.attn(x, attn_mask=mask, is_causal=True)
        return attended


class TestCausality:
    @pytest.mark.parametrize("masks", AGREEING)
    def test_no_output_depends_on_a_later_position(self, masks: str) -> None:
        layer, x = layer_of(), torch.randn(1, T, D)
        before = layer(x, is_causal=True, **AGREEING[masks])
        for t in range(T - 1):
            changed = x.clone()
            changed[:, t + 1 :] += 10
            after = layer(changed, is_causal=True, **AGREEING[masks])
            torch.testing.assert_close(after[:, : t + 1], before[:, : t + 1], rtol=0, atol=0)
            assert masks == "padding alone" or not torch.allclose(after[:, t + 1 :], before[:, t + 1 :])

    @pytest.mark.parametrize("masks", [name for name, masks in AGREEING.items() if "attn_mask" in masks])
    def test_a_mask_that_is_causal_itself_gives_the_same_with_and_without(self, masks: str) -> None:
        layer, x = layer_of(), torch.randn(1, T, D)
        torch.testing.assert_close(layer(x, is_causal=True, **AGREEING[masks]), layer(x, **AGREEING[masks]))

    @pytest.mark.parametrize("mask", CONTRADICTING)
    @pytest.mark.parametrize("block", [False, True])
    def test_a_mask_that_permits_a_later_key_is_refused(self, mask: str, block: bool) -> None:
        layer = TransformerEncoderBlock(D, H, 8) if block else layer_of()
        later = "query 1 attend to the later key 3" if "one" in mask else "query 0 attend to the later key 1"
        with pytest.raises(ValueError, match=f"is_causal contradicts attn_mask, which lets {later}; hide later keys"):
            layer(torch.randn(2, T, D), attn_mask=CONTRADICTING[mask], is_causal=True)

    def test_an_exported_program_is_causal_whatever_mask_it_gets(self) -> None:
        module, x = AsksForBoth().eval(), torch.randn(2, T, D)
        program = torch.export.export(module, (x, LATER)).module()
        torch.testing.assert_close(program(x, LATER), module(x, LATER))
        torch.testing.assert_close(program(x, CONTRADICTING["nothing hidden"]), module(x, LATER))

    @pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
    def test_a_traced_program_is_causal_whatever_mask_it_gets(self) -> None:
        module, x = AsksForBoth().eval(), torch.randn(2, T, D)
        program = torch.jit.trace(module, (x, LATER), check_trace=False)
        torch.testing.assert_close(program(x, CONTRADICTING["nothing hidden"]), module(x, LATER))

    def test_later_positions_do_count_without_it(self) -> None:
        layer, x = layer_of(), torch.randn(1, T, D)
        changed = x.clone()
        changed[:, -1] += 10
        assert not torch.allclose(layer(changed)[:, 0], layer(x)[:, 0])


HIDING: dict[str, Callable[[], dict[str, Tensor | bool]]] = {
    "boolean 2-D": lambda: {"attn_mask": torch.arange(T)[:, None].eq(1).expand(T, T)},
    "boolean 3-D": lambda: {"attn_mask": torch.arange(T)[None, :, None].eq(1).expand(N, T, T)},
    "boolean 4-D": lambda: {"attn_mask": torch.arange(T)[None, None, :, None].eq(1).expand(N, H, T, T)},
    "additive": lambda: {"attn_mask": torch.zeros(T, T).masked_fill(torch.arange(T)[:, None].eq(1), -math.inf)},
    "lowest float": lambda: {
        "attn_mask": torch.zeros(T, T).masked_fill(torch.arange(T)[:, None].eq(1), torch.finfo(torch.float32).min)
    },
}


class TestFullyMaskedRows:
    @pytest.mark.parametrize("kind", HIDING)
    def test_query_that_sees_nothing_gets_zeros_and_the_others_what_they_got(self, kind: str) -> None:
        layer, x = layer_of(), torch.randn(N, T, D, requires_grad=True)
        output, weights = layer.attend(x, **HIDING[kind]())  # type: ignore[arg-type]
        assert (weights[:, :, 1] == 0).all()
        torch.testing.assert_close(output[:, 1], layer.out.bias.expand(N, D))
        others = [0, 2, 3, 4]
        torch.testing.assert_close(output[:, others], layer(x)[:, others])
        with torch.autograd.set_detect_anomaly(True):  # raises on a NaN between layers, even one that's masked later
            output.square().sum().backward()
        assert x.grad is not None
        assert x.grad.isfinite().all()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())

    def test_output_is_zero_with_the_initial_bias(self) -> None:
        layer = MultiHeadAttention(D, H)
        padding = torch.ones(N, T, dtype=torch.bool)
        assert (layer(torch.randn(N, T, D), key_padding_mask=padding) == 0).all()

    def test_row_of_padding_alone_beside_a_normal_one(self) -> None:
        layer, x = layer_of(), torch.randn(2, T, D, requires_grad=True)
        padding = torch.tensor([[True] * T, [False] * T])
        output, weights = layer.attend(x, key_padding_mask=padding, is_causal=True)
        assert (weights[0] == 0).all()
        torch.testing.assert_close(output[1:], layer(x[1:], is_causal=True))
        output.sum().backward()
        assert x.grad is not None
        assert x.grad.isfinite().all()
        assert (x.grad[0] == 0).all()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())

    def test_causal_query_whose_only_past_is_padding(self) -> None:
        layer, x = layer_of(), torch.randn(1, T, D)
        padding = torch.tensor([[True, True, False, False, False]])
        output, weights = layer.attend(x, key_padding_mask=padding, is_causal=True)
        assert (weights[:, :, :2] == 0).all()
        assert output.isfinite().all()
        torch.testing.assert_close(weights[:, :, 2:].sum(-1), torch.ones(1, H, 3))


class TestLowPrecision:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("how", ["autocast", "weights"])
    @pytest.mark.parametrize(
        "value", [None, -math.inf, -1e9, torch.finfo(torch.float32).min, torch.finfo(torch.float16).min]
    )
    def test_masks_of_any_habit(self, dtype: torch.dtype, how: str, value: float | None) -> None:
        torch.manual_seed(0)
        layer, x = MultiHeadAttention(D, H), torch.randn(N, T, D)
        hidden = torch.rand(T, T) < 0.4
        hidden[:, 0] = False
        hidden[2] = True
        mask = hidden if value is None else torch.zeros(T, T).masked_fill(hidden, value)
        expected = layer(x, attn_mask=hidden)
        if how == "autocast":
            with torch.autocast("cpu", dtype):
                got = layer(x, attn_mask=mask)
        else:
            got = copy.deepcopy(layer).to(dtype)(x.to(dtype), attn_mask=mask)
        # Not the lowest number of bfloat16: a row that it hides entirely is an average, as in torch.
        averaged = dtype == torch.bfloat16 and value in (-1e9, torch.finfo(torch.float16).min)
        rows = [0, 1, 3, 4] if averaged else [0, 1, 2, 3, 4]
        assert got.isfinite().all()
        torch.testing.assert_close(got[:, rows].float(), expected[:, rows], rtol=0, atol=1e-2)

    def test_large_scores_do_not_overflow_half(self) -> None:
        layer = MultiHeadAttention(64, 1)
        for projection in (layer.query, layer.key, layer.value, layer.out):
            nn.init.eye_(projection.weight)
        x = torch.full((1, 2, 64), 40.0)  # 64 · 40² = 102,400 before scaling, 12,800 after it
        assert layer.half()(x.half()).tolist() == x.tolist()
