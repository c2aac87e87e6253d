"""Edits as a library: what modules return besides plain tensors, and what can't be edited."""

from typing import NamedTuple

import attention_modules
import pytest
import torch
from torch import nn

from layercast.models.edits import Add, Clamp, Edit, Mean, Request, Scale, SteeringError, Zero, plan
from layercast.models.examples import Examples
from layercast.models.hooks import FeatureExtractor, fused_attention_off, registered_hooks
from layercast.models.layer_index import build_index
from layercast.models.manifest import LayerSpec, TensorSpec
from layercast.models.steering import steered


class Pair(NamedTuple):
    left: torch.Tensor
    right: torch.Tensor


class Returns(nn.Module):
    """Returns what `kind` says, of x and 2x."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x):
        made = {
            "tuple": (x, x * 2),
            "list": [x, x * 2],
            "named": Pair(x, x * 2),
            "dict": {"a": x, "b": [x * 2]},
            "whole": (x, (x * 2).long()),
        }
        return made[self.kind]


class Sums(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.inner = Returns(kind)

    def forward(self, x):
        made = self.inner(x)
        if self.kind_is_dict():
            return made["a"] + made["b"][0]
        return (made.left + made.right) if isinstance(made, Pair) else made[0] + made[1]

    def kind_is_dict(self) -> bool:
        return self.inner.kind == "dict"


FLOATS = Examples([TensorSpec(name="x", datatype="FP32", shape=(-1, 4))])
TOKENS = Examples([TensorSpec(name="tokens", datatype="INT64", shape=(-1, -1), range=(0, 99), pad=0, max_length=16)])


def planned(model: nn.Module, edit: Edit, examples: Examples = FLOATS, **request):
    return plan(model, {layer.path: layer for layer in build_index(model, examples)}, edit, Request(**request))


@pytest.mark.parametrize(
    ("kind", "layer"),
    [("tuple", "inner[1]"), ("list", "inner[1]"), ("named", "inner[1]"), ("dict", "inner[b][0]"), ("dict", "inner[a]")],
)
def test_a_part_of_what_a_module_returns(kind, layer):
    model, x = Sums(kind).eval(), torch.randn(3, 4)
    given = x.clone()
    edit = planned(model, Edit(layer, Add((1.0, 2.0)), units=(3, 0)), rows=2)
    with torch.inference_mode(), steered(model, [(slice(1, 3), edit)]):
        got = model(x)
    wanted = x * 3
    wanted[1:, 3] += 1
    wanted[1:, 0] += 2
    torch.testing.assert_close(got, wanted)
    assert torch.equal(x, given), "the module's own input, which it returns, is not written to"
    assert registered_hooks(model) == []


def test_a_recurrent_layer_and_a_transformers_output():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(4, 5, batch_first=True)

        def forward(self, x):
            return self.lstm(x)[0][:, -1]

    model, x = Recurrent().eval(), torch.randn(2, 6, 4)
    examples = Examples([TensorSpec(name="x", datatype="FP32", shape=(-1, 6, 4))])
    edit = planned(model, Edit("lstm[0]", Zero(), positions=(5,), units=(1,)), examples, rows=2)
    with torch.inference_mode(), steered(model, [(slice(0, 2), edit)]):
        got = model(x)
    wanted = model(x).detach()
    wanted[:, 1] = 0
    torch.testing.assert_close(got, wanted)

    bert, tokens = attention_modules.Bert("eager").eval(), torch.randint(1, 99, (2, 7))
    edit = planned(bert, Edit("bert[pooler_output]", Scale(-2.0)), TOKENS, rows=2, length=7, tokens=[7, 7])
    with torch.inference_mode(), steered(bert, [(slice(0, 2), edit)]):
        got = bert(tokens)
    torch.testing.assert_close(got, bert(tokens).detach() * -2)
    # A head is a run of the units that the self-attention returns: 8 to 15 are the second of two.
    edit = planned(
        bert,
        Edit("bert.encoder.layer.1.attention.self[0]", Zero(), units=tuple(range(8, 16))),
        TOKENS,
        rows=2,
        length=7,
    )
    with torch.inference_mode(), steered(bert, [(slice(0, 2), edit)]):
        got = bert(tokens)
    dense = bert.bert.encoder.layer[1].attention.output.dense
    with torch.no_grad():
        dense.weight[:, 8:] = 0
    torch.testing.assert_close(got, bert(tokens).detach())


@pytest.mark.parametrize(
    ("layer", "heads", "message"),
    [
        ("encoder.layers.0.self_attn[0]", (0,), "torch's MultiheadAttention joins and projects its heads"),
        ("encoder.layers.0.self_attn[weights]", (), "the module computes with other tensors"),
        ("encoder.layers.0", (0,), "a TransformerEncoderLayer is no MultiHeadAttention of layercast.*a run of its units"),
        ("encoder.layers.0.self_attn.out_proj", (), "never called in eval mode"),
    ],
)  # fmt: skip
def test_what_of_torchs_attention_can_not_be_edited(layer, heads, message):
    with pytest.raises(SteeringError, match=message):
        planned(attention_modules.TorchEncoder().eval(), Edit(layer, Zero(), heads=heads), TOKENS, rows=2, length=5)


def test_layers_inside_torchs_encoder_are_edited_though_its_fused_path_calls_none():
    model, tokens = attention_modules.TorchEncoder().eval(), torch.randint(1, 99, (2, 5))
    edit = planned(model, Edit("encoder.layers.1.norm2", Zero()), TOKENS, rows=2, length=5)
    with torch.inference_mode(), steered(model, [(slice(0, 2), edit)]):
        got = model(tokens)
    torch.testing.assert_close(got, model.head.bias.detach().expand(2, 2))
    assert torch.backends.mha.get_fastpath_enabled()


def test_taps_see_what_an_edit_made_also_where_the_forward_ends_early():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval(), torch.randn(3, 4)
    edit = planned(
        model, Edit("0", Clamp(low=1.0)), Examples([TensorSpec(name="input", datatype="FP32", shape=(-1, 4))]), rows=1
    )
    extractor = FeatureExtractor(model, ["1"], known=["0", "1", "2"], predictions=False)
    with torch.inference_mode(), steered(model, [(slice(2, 3), edit)]), extractor:
        got = extractor.run(x)
    assert got.stopped_early
    plain = model[:2](x).detach()
    torch.testing.assert_close(got.features["1"][:2], plain[:2])
    torch.testing.assert_close(got.features["1"][2], plain[2].clamp(min=1.0))


def test_a_mean_of_halves_does_not_overflow_and_without_any_token_is_zero():
    model = nn.Sequential(nn.Identity()).half().eval()
    spec = LayerSpec(path="0", type="Identity", shape=(-1, -1, 2), datatype="FP16")
    x = torch.full((2, 3, 2), 60000.0).half()
    for mask, wanted in (
        (torch.tensor([[True, True, False]] * 2), 60000.0),
        (torch.zeros(2, 3, dtype=torch.bool), 0.0),
    ):
        edit = plan(model, {"0": spec}, Edit("0", Mean()), Request(2, 3, mask.sum(dim=1).tolist()))
        with torch.inference_mode(), steered(model, [(slice(0, 2), edit)], mask):
            assert torch.equal(model(x), torch.full_like(x, wanted))
    with pytest.raises(SteeringError, match="want a finite number that FP16 holds, got 70000"):
        plan(model, {"0": spec}, Edit("0", Scale(70000.0)), Request(2, 3))
    whole = LayerSpec(path="0", type="Identity", shape=(-1, 2), datatype="INT64")
    with pytest.raises(SteeringError, match="it holds INT64, not floats"):
        plan(model, {"0": whole}, Edit("0", Zero()), Request(2))
    with pytest.raises(SteeringError, match="one number a row"):
        plan(model, {"0": spec.model_copy(update={"shape": (-1,)})}, Edit("0", Zero()), Request(2))


def test_an_edit_that_would_change_nothing_or_does_not_fit_is_told_and_leaves_no_hook():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.a(x)

    model = Half().eval()
    specs = {path: LayerSpec(path=path, type="Linear", shape=(-1, 4), datatype="FP32") for path in "ab"}
    edit = plan(model, specs, Edit("b", Zero()), Request(1))
    with pytest.raises(SteeringError, match="layer 'b' did not run"), steered(model, [(slice(0, 1), edit)]):
        model(torch.randn(1, 4))
    narrow = plan(model, {"a": specs["a"].model_copy(update={"shape": (-1, 3)})}, Edit("a", Zero()), Request(1))
    with pytest.raises(SteeringError, match=r"\[4\] a row .* not \[3\]"), steered(model, [(slice(0, 1), narrow)]):
        model(torch.randn(1, 4))
    assert registered_hooks(model) == []
    with fused_attention_off():
        assert not torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.mha.get_fastpath_enabled()
