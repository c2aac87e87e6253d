"""Explanations equal captum's, on every architecture of the zoo."""

import captum.attr as captum
import pytest
import torch
from torch import nn

from layercast.models.explain import explain
from layercast.models.registry import build

SIZES = {
    "SimpleNet": ({"input_size": 12, "hidden_size": 8}, (12,)),
    "MLP": ({"input_size": 12, "hidden_sizes": [8, 6]}, (12,)),
    "SharedWeights": ({}, (10,)),
    "MNISTClassifier": ({}, (1, 28, 28)),
    "ResNetLike": ({"squeeze_excitation": True}, (3, 16, 16)),
}
TARGETS = [1, 0, 3]
TRANSFORMER = {"max_length": 8, "embed_dim": 8, "num_heads": 2, "ff_dim": 16}


def network(name: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    arguments, shape = SIZES[name]
    model = settled(build(name, **arguments), shape)
    return model, torch.rand(3, *shape)


def settled(model: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    """Give batch norms statistics other than those of a new network, and go to eval mode."""
    with torch.no_grad():
        model.train()(torch.rand(8, *shape))
    return model.eval()


@pytest.fixture(params=SIZES)
def case(request, one_thread):
    return network(request.param)


def close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    assert wanted.abs().max() > 1e-6  # or anything would do
    torch.testing.assert_close(got, wanted.detach().to(got.dtype), atol=1e-4, rtol=1e-4)


def test_saliency(case):
    model, x = case
    close(explain(model, x, "saliency", TARGETS).attributions,
          captum.Saliency(model).attribute(x.clone().requires_grad_(), target=TARGETS))  # fmt: skip


def test_input_x_gradient(case):
    model, x = case
    wanted = captum.InputXGradient(model).attribute(x.clone().requires_grad_(), target=TARGETS)
    close(explain(model, x, "input-x-gradient", TARGETS).attributions, wanted)


@pytest.mark.parametrize("baseline", [None, 0.25])
def test_integrated_gradients(case, baseline):
    model, x = case
    got = explain(model, x, "integrated-gradients", TARGETS, steps=20, baseline=baseline)
    wanted, delta = captum.IntegratedGradients(model).attribute(
        x, baselines=baseline, target=TARGETS, n_steps=20, return_convergence_delta=True
    )
    close(got.attributions, wanted)
    torch.testing.assert_close(got.delta, delta.float(), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "ours", "theirs"),
    [
        ("MLP", {"window": 3, "stride": 2}, {"sliding_window_shapes": (3,), "strides": 2}),
        ("MNISTClassifier", {"window": 7}, {"sliding_window_shapes": (1, 7, 7), "strides": (1, 7, 7)}),
        ("ResNetLike", {"window": 5, "stride": 4, "baseline": 0.5},
         {"sliding_window_shapes": (3, 5, 5), "strides": (3, 4, 4), "baselines": 0.5}),
        ("ResNetLike", {"window": (1, 6, 8), "stride": (1, 6, 8)},
         {"sliding_window_shapes": (1, 6, 8), "strides": (1, 6, 8)}),
    ],
)  # fmt: skip
def test_occlusion(name, ours, theirs, one_thread):
    model, x = network(name)
    close(explain(model, x, "occlusion", TARGETS, **ours).attributions,
          captum.Occlusion(model).attribute(x, target=TARGETS, **theirs))  # fmt: skip


@pytest.mark.parametrize("layer", ["stem", "layer1.0.conv2", "layer2.*.shortcut.0", "layer1.1", None])
def test_grad_cam(layer, one_thread):
    model, x = network("ResNetLike")
    named = {"layer2.*.shortcut.0": "layer2.0.shortcut.0", None: "layer2.1.conv2"}.get(layer, layer)
    got = explain(model, x, "gradcam", TARGETS, layer=layer)
    module = model.get_submodule(named)
    wanted = captum.LayerGradCam(model, module).attribute(x, target=TARGETS, relu_attributions=True)
    close(explain(model, x, "gradcam", TARGETS, layer=layer, upsample=False).attributions, wanted[:, 0])
    larger = captum.LayerAttribution.interpolate(wanted, (16, 16), "bilinear")
    close(got.attributions, larger[:, 0])


@pytest.fixture
def transformer():
    torch.manual_seed(0)
    model = build("TransformerEncoder", **TRANSFORMER).eval()
    # A trained model's embeddings are larger than a new one's, whose gradients would all be the same.
    nn.init.normal_(model.token.weight)
    with torch.no_grad():
        model.token.weight[256].zero_()
    tokens = torch.randint(0, 256, (3, 8))
    tokens[1, 5:] = tokens[2, 1:] = 256
    return model, tokens


def test_integrated_gradients_of_tokens(transformer):
    model, tokens = transformer
    got = explain(model, tokens, "integrated-gradients", [1, 0, 1], steps=30)
    # Its error is not compared: captum takes the baseline's score from ids that are all padding, mask and all.
    wanted = captum.LayerIntegratedGradients(model, model.token).attribute(
        tokens, baselines=256, target=[1, 0, 1], n_steps=30
    )
    close(got.attributions, wanted.sum(dim=2))


@pytest.mark.parametrize("method", ["saliency", "input-x-gradient"])
def test_gradients_of_tokens(transformer, method):
    model, tokens = transformer
    got = explain(model, tokens, method, [1, 0, 1]).attributions
    times_input = method == "input-x-gradient"
    theirs = captum.LayerGradientXActivation(model, model.token, multiply_by_inputs=times_input)
    wanted = theirs.attribute(tokens, target=[1, 0, 1])
    close(got, (wanted if times_input else wanted.abs()).sum(dim=2))
    assert not got[1, 5:].any()
    assert got[1, :5].all()


def test_occlusion_of_tokens(transformer):
    model, tokens = transformer
    got = explain(model, tokens, "occlusion", [1, 0, 1], baseline=32).attributions
    wanted = captum.Occlusion(model).attribute(tokens, (1,), target=[1, 0, 1], baselines=32)
    close(got, wanted.masked_fill(tokens == 256, 0))
