"""Hooks on whole networks: torch's encoder, attention maps, in-place networks against out-of-place twins."""

import copy

import pytest
import torch
from torch import Tensor, nn

from layercast.models.architectures.resnet import ResNetLike
from layercast.models.architectures.transformer import TransformerEncoder
from layercast.models.hooks import FeatureExtractor, GradientExtractor, ReducerError, registered_hooks
from layercast.models.layers import ResidualBlock

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
def test_no_module_of_torchs_encoder_is_silent_in_eval(nested: bool, norm_first: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 8, 64, batch_first=True, norm_first=norm_first)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested and not norm_first).eval()
    x, padding = torch.randn(2, 5, 32), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.inference_mode(), FeatureExtractor(encoder, ["*"]) as extractor:
        got = extractor.run(x, src_key_padding_mask=padding)
    paths = {name.partition("[")[0] for name in got.features}
    computing = {path for path, module in encoder.named_modules() if path and not isinstance(module, nn.ModuleList)}
    # Its attention reads the weights of out_proj itself, so that module never runs.
    assert computing - paths == {path for path in computing if path.endswith("out_proj")}
    # With gradients torch takes the slow path.
    seen: dict[str, Tensor] = {}
    attention = encoder.layers[1].self_attn
    attention.register_forward_hook(lambda _, __, output: seen.__setitem__("attn", output[0]))
    slow = encoder(x, src_key_padding_mask=padding)
    torch.testing.assert_close(got.features["layers.1.self_attn[0]"][~padding], seen["attn"][~padding].detach())
    torch.testing.assert_close(got.output[~padding], slow[~padding].detach())
    assert torch.backends.mha.get_fastpath_enabled()


def test_attention_maps_by_head_leave_the_answer_as_it_is() -> None:
    torch.manual_seed(0)
    model = TransformerEncoder().eval()
    tokens = torch.randint(0, 256, (2, 9))
    tokens[1, 6:] = 256
    with torch.inference_mode():
        plain = model(tokens)
        with FeatureExtractor(model, ["blocks.*.attn.weights"]) as extractor:
            got = extractor.run(tokens)
    assert list(got.features) == ["blocks.0.attn.weights", "blocks.1.attn.weights"]
    for maps in got.features.values():
        assert maps.shape == (2, 4, 9, 9)
        torch.testing.assert_close(maps.sum(-1), torch.ones(2, 4, 9))
        assert (maps[1, ..., 6:] == 0).all()
    torch.testing.assert_close(got.output, plain)


def test_a_value_is_kept_before_a_later_relu_changes_it_in_place() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(inplace=True))
    x = torch.randn(2, 2, 6, 6)
    with torch.inference_mode(), FeatureExtractor(model, ["0", "1"]) as extractor:
        features = extractor.run(x).features
        wanted = model[0](x)
    assert (wanted < 0).any()
    torch.testing.assert_close(features["0"], wanted)
    torch.testing.assert_close(features["1"], wanted.clamp(min=0))


class OutOfPlace(nn.Module):
    """A ResidualBlock's forward without one in-place operation."""

    def __init__(self, block: ResidualBlock) -> None:
        super().__init__()
        for name, module in block.named_children():
            self.add_module(name, nn.ReLU() if isinstance(module, nn.ReLU) else module)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        activated: Tensor = self.relu2(self.se(out) + self.shortcut(x))
        return activated


def twin_of(model: ResNetLike) -> ResNetLike:
    twin = copy.deepcopy(model)
    twin.relu = nn.ReLU()
    for stage in (twin.layer1, twin.layer2):
        for index, block in enumerate(stage):
            stage[index] = OutOfPlace(block)
    for module in twin.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    return twin


@pytest.mark.parametrize("squeeze", [False, True])
def test_gradients_in_place_equal_full_backward_hooks_on_a_twin_that_is_not(squeeze: bool) -> None:
    torch.manual_seed(0)
    model, image = ResNetLike(squeeze_excitation=squeeze).eval(), torch.rand(2, 3, 12, 12)
    twin, wanted = twin_of(model), {}
    for path, module in twin.named_modules():
        if path and not (squeeze and "se" in path.split(".")):  # a squeeze-and-excitation works in place
            module.register_full_backward_hook(
                lambda _, __, gradients, path=path: wanted.__setitem__(path, gradients[0])
            )
    twin(image.clone().requires_grad_())[:, 4].sum().backward()
    with GradientExtractor(model, ["*"]) as extractor:
        model(image)[:, 4].sum().backward()
    assert {
        "layer1.0.conv1",
        "layer1.0.relu1",
        "layer1.0.shortcut",
        "layer2.0.shortcut.1",
        "layer2.1",
        "stem",
        "head",
    } <= wanted.keys()
    for path, gradient in wanted.items():
        torch.testing.assert_close(extractor.gradients[path], gradient, msg=lambda text, path=path: f"{path}: {text}")
    assert registered_hooks(model) == []
    # What the in-place model can't have: torch refuses full backward hooks there.
    handle = model.bn.register_full_backward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match="modified inplace"):
        model(image)
    handle.remove()


def test_gradients_are_those_of_the_last_forward_alone() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    with GradientExtractor(model, ["0"]) as extractor:
        earlier, later = model(torch.ones(1, 3)), model(torch.zeros(1, 3))
        (5 * earlier).sum().backward()
        assert extractor.gradients == {}
        later.sum().backward()
    torch.testing.assert_close(extractor.gradients["0"], model[1].weight.sum(0, keepdim=True))
    torch.testing.assert_close(extractor.activations["0"], model[0].bias[None])


def test_a_module_that_returns_its_input_gets_the_gradient_of_what_it_returned() -> None:
    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.same, self.dropout, self.unused = (
                nn.Linear(3, 3),
                nn.Identity(),
                nn.Dropout(),
                nn.Identity(),
            )

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            same: Tensor = self.same(y)
            same += 1.0
            self.unused(y)
            return 2 * same + 3 * y + 5 * self.dropout(y)

    model = Skip().eval()
    with GradientExtractor(model, ["*"]) as extractor:
        model(torch.randn(1, 3)).sum().backward()
    # `same += 1` changes y itself, which is the same memory: all three terms are of it from there on.
    assert {name: value.tolist() for name, value in extractor.gradients.items()} == {
        "first": [[10.0] * 3],
        "same": [[10.0] * 3],
        "dropout": [[5.0] * 3],
    }


def test_the_order_is_learned_and_the_second_forward_stops_early() -> None:
    model, ran = ResNetLike().eval(), []
    model.layer2.register_forward_hook(lambda *_: ran.append("layer2"))
    image = torch.rand(1, 3, 8, 8)
    with torch.inference_mode(), FeatureExtractor(model, "layer1.*.relu2@mean", predictions=False) as extractor:
        first, second = extractor.run(image), extractor.run(image)
    assert (first.stopped_early, second.stopped_early) == (False, True)
    assert ran == ["layer2"]
    assert {name: list(value.shape) for name, value in second.features.items()} == {
        "layer1.0.relu2@mean": [1, 64],
        "layer1.1.relu2@mean": [1, 64],
    }
    for name, value in first.features.items():
        assert torch.equal(value, second.features[name])


class Failing(nn.Module):
    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.error: BaseException | None = error

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.first(x)
        if self.error is not None:
            raise self.error
        return y


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt(), SystemExit(3), MemoryError()])
@pytest.mark.parametrize("kind", [FeatureExtractor, GradientExtractor])
def test_no_error_leaves_a_hook_or_the_fused_path_off(kind: type, error: BaseException) -> None:
    model = Failing(error)
    with pytest.raises(type(error)), kind(model, ["first"]) as extractor:
        extractor.run(torch.zeros(1, 3)) if kind is FeatureExtractor else model(torch.zeros(1, 3))
    assert registered_hooks(model) == []
    assert torch.backends.mha.get_fastpath_enabled()


def test_an_extractor_goes_on_after_an_error() -> None:
    model = Failing(RuntimeError("once"))
    with FeatureExtractor(model, ["first"]) as extractor:
        with pytest.raises(RuntimeError, match="once"):
            extractor.run(torch.zeros(1, 3))
        model.error = None
        assert extractor.run(torch.ones(2, 3)).features["first"].shape == (2, 3)
        with pytest.raises(RuntimeError, match="already open"):
            extractor.__enter__()
    assert registered_hooks(model) == []


def test_a_reducer_that_does_not_fit_names_the_layer_and_leaves_no_hook() -> None:
    model = nn.Sequential(nn.Linear(3, 4))
    with pytest.raises(ReducerError, match="layer 0"), FeatureExtractor(model, ["0@cls"]) as extractor:
        extractor.run(torch.zeros(2, 3))
    assert registered_hooks(model) == []
