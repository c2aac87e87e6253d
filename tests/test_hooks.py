"""Feature and gradient extraction as a library, against hand-written hooks and autograd."""

import pytest
import torch
from torch import nn

from layercast.models.hooks import FeatureExtractor, GradientExtractor, LayerError, ReducerError, registered_hooks


class Residual(nn.Module):
    """In-place ReLU and an in-place addition, a module used twice, a tuple and a dict on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.relu = nn.ReLU(inplace=True)
        self.pair = Pair()
        self.twice = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        y = self.relu(self.first(x))
        low, named = self.pair(y)
        z = self.twice(low)
        z += named["double"]
        return self.head(self.twice(z))


class Pair(nn.Module):
    def forward(self, x):
        return x + 1, {"double": x * 2}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Residual().eval()


X = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))


def by_hand(model):
    """Every tensor on the way, out of place."""
    first = model.first(X)
    relu = first.clamp(min=0)
    once = model.twice(relu + 1)
    return {
        "first": first, "relu": relu, "pair[0]": relu + 1, "pair[1][double]": relu * 2, "twice#0": once,
        "twice#1": model.twice(once + relu * 2), "head": model.head(model.twice(once + relu * 2)),
    }  # fmt: skip


def test_every_layer_has_the_value_it_returned(model):
    with torch.inference_mode(), FeatureExtractor(model, ["*"]) as extractor:
        got = extractor.run(X)
    with torch.inference_mode():
        wanted = by_hand(model)
    assert set(got.features) == set(wanted)
    for name, value in wanted.items():
        torch.testing.assert_close(got.features[name], value)
    torch.testing.assert_close(got.output, wanted["head"])
    assert registered_hooks(model) == []


def test_without_predictions_the_forward_stops_after_the_deepest_layer(model):
    ran: list[int] = []
    known = list(by_hand(model))
    model.head.register_forward_hook(lambda *_: ran.append(1))
    with (
        torch.inference_mode(),
        FeatureExtractor(model, ["first", "twice#0"], known=known, predictions=False) as extractor,
    ):
        got = extractor.run(X)
    assert got.stopped_early
    assert got.output is None
    assert not ran
    assert set(got.features) == {"first", "twice#0"}


def test_hooks_are_removed_after_an_error(model):
    with pytest.raises(RuntimeError), FeatureExtractor(model, ["*"]) as extractor:
        extractor.run(torch.zeros(4, 5))
    assert registered_hooks(model) == []


def test_unknown_layers_and_reducers_name_the_nearest(model):
    with pytest.raises(LayerError, match="nearest: first"):
        FeatureExtractor(model, ["frist"])
    with pytest.raises(ReducerError, match="unknown reducer 'avg'"):
        FeatureExtractor(model, ["first@avg"])


def test_gradients_equal_autograd_in_spite_of_in_place_operations(model):
    with GradientExtractor(model, ["*"]) as extractor:
        model(X)[:, 1].sum().backward()
    values = {name: value.detach() for name, value in by_hand(model).items()}
    first = values["first"].clone().requires_grad_()
    relu = first.clamp(min=0)
    model.head(model.twice(model.twice(relu + 1) + relu * 2))[:, 1].sum().backward()
    torch.testing.assert_close(extractor.gradients["first"], first.grad)
    torch.testing.assert_close(extractor.activations["first"], values["first"])
    assert registered_hooks(model) == []


def test_torchs_fused_encoder_shows_its_attention():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(2, 5, 8)
    with torch.inference_mode(), FeatureExtractor(layer, ["self_attn*", "linear1"]) as extractor:
        got = extractor.run(x)
    with torch.inference_mode():
        wanted, _ = layer.self_attn(x, x, x, need_weights=False)
    torch.testing.assert_close(got.features["self_attn[0]"], wanted)
    assert got.features["linear1"].shape == (2, 5, 16)
