"""What holds for every explanation: known cases, rows and chunks that don't matter, a model left as it was."""

import numpy as np
import pytest
import torch
from torch import nn

from layercast.models.explain import METHODS, ExplainError, explain
from layercast.models.hooks import LayerError, registered_hooks
from layercast.models.registry import build


class InPlace(nn.Module):
    """Changes its input, its activations and a skip in place; a small network that every float method fits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.again = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 3)

    def forward(self, image):
        image *= 2
        x = self.relu(self.conv(image))
        y = self.again(x)
        y += x
        y = self.relu(y)
        return {"features": y, "logits": self.head(y.mean(dim=(2, 3)))}


ROWS = torch.rand(5, 2, 8, 8, generator=torch.Generator().manual_seed(3))
OPTIONS = {"smoothgrad": {"samples": 4}, "integrated-gradients": {"steps": 6}, "occlusion": {"window": 4}}
FLOAT_METHODS = [name for name in METHODS if name != "attention-rollout"]


@pytest.fixture
def model(one_thread):
    torch.manual_seed(0)
    return InPlace().eval()


@pytest.fixture
def transformer(one_thread):
    torch.manual_seed(0)
    model = build("TransformerEncoder", max_length=8, embed_dim=8, num_heads=2, ff_dim=16).eval()
    nn.init.normal_(model.token.weight)
    with torch.no_grad():
        model.token.weight[256].zero_()
    tokens = torch.randint(0, 256, (3, 8))
    tokens[1, 5:] = tokens[2, 1:] = 256
    return model, tokens


def of(model, method, x=ROWS, targets=(0, 1, 2, 0, 1), **options):
    targets = list(targets)[: len(x)]
    return explain(model, x, method, targets, output="logits", **{**OPTIONS.get(method, {}), **options})


def test_a_linear_model_by_hand(one_thread):
    model = nn.Linear(3, 2, bias=True).eval()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, -2.0, 3.0], [0.5, 0.0, -4.0]]))
        model.bias.copy_(torch.tensor([7.0, 11.0]))
    x = torch.tensor([[1.0, 1.0, 2.0], [2.0, 3.0, -1.0]])
    wanted = {
        "saliency": [[0.5, 0.0, 4.0], [1.0, 2.0, 3.0]],
        "smoothgrad": [[0.5, 0.0, -4.0], [1.0, -2.0, 3.0]],
        "input-x-gradient": [[0.5, 0.0, -8.0], [2.0, -6.0, -3.0]],
        "integrated-gradients": [[0.5, 0.0, -8.0], [2.0, -6.0, -3.0]],
        "occlusion": [[0.5, 0.0, -8.0], [2.0, -6.0, -3.0]],
    }
    for method, values in wanted.items():
        got = explain(model, x, method, [1, 0])
        torch.testing.assert_close(got.attributions, torch.tensor(values), msg=method)
        assert got.targets.tolist() == [1, 0]
        assert (got.delta is None) == (method != "integrated-gradients")
    from_two = explain(model, x, "integrated-gradients", [1, 0], baseline=torch.tensor([0.0, 1.0, 2.0]))
    torch.testing.assert_close(from_two.attributions, torch.tensor([[0.5, 0.0, 0.0], [2.0, -4.0, -9.0]]))


def test_grad_cam_by_hand(one_thread):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 1, bias=False)

        def forward(self, x):
            return (self.conv(x) * torch.tensor([1.0, -3.0])[:, None, None]).sum(dim=(2, 3))

    model = Net().eval()
    nn.init.ones_(model.conv.weight)
    x = torch.tensor([[[[1.0, -2.0], [0.0, 5.0]]]])
    assert explain(model, x, "gradcam", 0).attributions.tolist() == [[[1.0, 0.0], [0.0, 5.0]]]
    assert explain(model, x, "gradcam", 1).attributions.tolist() == [[[0.0, 6.0], [0.0, 0.0]]]


def test_smoothgrad_is_the_mean_over_the_documented_noise(model):
    got = of(model, "smoothgrad", samples=3, noise=0.2, seed=5).attributions
    spread = 0.2 * (ROWS.flatten(1).amax(1) - ROWS.flatten(1).amin(1)).view(5, 1, 1, 1)
    total = torch.zeros_like(ROWS)
    for sample in range(3):
        drawn = np.random.Generator(np.random.PCG64([5, sample])).standard_normal((2, 8, 8))
        x = (ROWS + spread * torch.from_numpy(drawn).float()).requires_grad_()
        model(x.clone())["logits"][range(5), [0, 1, 2, 0, 1]].sum().backward()
        total += x.grad
    torch.testing.assert_close(got, total / 3)


def test_integrated_gradients_are_complete_within_their_error(model, transformer):
    got = of(model, "integrated-gradients", steps=64)
    with torch.no_grad():
        ends = [model(x.clone())["logits"][range(5), got.targets] for x in (ROWS, torch.zeros_like(ROWS))]
    total = got.attributions.sum(dim=(1, 2, 3))
    torch.testing.assert_close(total - (ends[0] - ends[1]), got.delta, atol=1e-5, rtol=0)
    assert got.delta.abs().max() < 0.02 * (ends[0] - ends[1]).abs().max()

    network, tokens = transformer
    got = explain(network, tokens, "integrated-gradients", steps=64)
    with torch.no_grad():
        start = network(tokens)[range(3), got.targets]
        handle = network.token.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
        difference = start - network(tokens)[range(3), got.targets]
        handle.remove()
    torch.testing.assert_close(got.attributions.sum(dim=1) - difference, got.delta, atol=1e-5, rtol=0)
    assert got.delta.abs().max() < 0.01


@pytest.mark.parametrize("method", FLOAT_METHODS)
def test_neither_chunks_nor_neighbours_matter(model, method):
    whole = of(model, method).attributions
    for few in ({"chunk_rows": 1}, {"chunk_rows": 3}):
        torch.testing.assert_close(of(model, method, **few).attributions, whole, atol=1e-6, rtol=1e-4)
    alone = of(model, method, ROWS[1:2], [1]).attributions
    torch.testing.assert_close(alone, whole[1:2], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "gradcam"])
def test_neighbours_and_their_padding_do_not_matter_to_tokens(transformer, method):
    model, tokens = transformer
    options = OPTIONS.get(method, {}) if method != "occlusion" else {}
    whole = explain(model, tokens, method, 1, **options).attributions
    assert whole.shape == (3, 8)
    assert not whole[tokens == 256].any()
    assert whole[tokens != 256].any()
    alone = explain(model, tokens[1:2, :5], method, 1, chunk_rows=2, **options).attributions
    torch.testing.assert_close(alone, whole[1:2, :5], atol=1e-6, rtol=1e-4)


def test_a_memory_budget_bounds_the_rows_of_a_forward(model):
    seen = []
    model.conv.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    of(model, "saliency", chunk_rows=4)
    assert max(seen) == 4
    seen.clear()
    big = torch.rand(3, 2, 256, 256)  # autograd keeps some megabytes for each row
    of(model, "saliency", big, memory_mb=1)
    assert max(seen) == 1


@pytest.mark.parametrize("method", FLOAT_METHODS)
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_the_model_and_the_inputs_are_left_as_they_were(model, method, mode):
    model.head.weight.requires_grad_(False)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    before = ROWS.clone()
    with mode():
        of(model, method)
    assert torch.equal(before, ROWS)
    assert registered_hooks(model) == []
    assert not model.head.weight.requires_grad
    assert all((p.grad == 3).all() and (p.requires_grad or p is model.head.weight) for p in model.parameters())
    assert not any(part.training for part in model.modules())


@pytest.mark.parametrize("method", list(METHODS))
def test_no_hook_is_left_after_an_error(model, transformer, method):
    class StopError(Exception):
        pass

    def stop(done: int, total: int) -> None:
        raise StopError

    network, x = transformer if method == "attention-rollout" else (model, ROWS)
    with pytest.raises(StopError):
        explain(network, x, method, 1, output=None if network is not model else "logits", progress=stop)
    network.head.register_forward_pre_hook(stop)
    network.head._forward_pre_hooks.clear()
    network.head.forward = lambda *_: stop(0, 0)
    with pytest.raises(StopError):
        explain(network, x, method, 1, output=None if network is not model else "logits")
    assert registered_hooks(network) == []


def test_progress_counts_rows(model):
    told = []
    of(model, "saliency", chunk_rows=2, progress=lambda done, total: told.append((done, total)))
    assert told == [(2, 5), (4, 5), (5, 5)]


def test_targets_are_the_largest_outputs_unless_given(model):
    with torch.no_grad():
        wanted = model(ROWS.clone())["logits"].argmax(dim=1)
    got = explain(model, ROWS, "saliency", output="logits")
    assert torch.equal(got.targets, wanted)
    torch.testing.assert_close(got.attributions, of(model, "saliency", targets=wanted.tolist()).attributions)
    assert explain(model, ROWS, "saliency", 2, output="logits").targets.tolist() == [2] * 5


def test_one_of_several_inputs():
    class Two(nn.Module):
        def forward(self, left, right):
            return (left * right).sum(dim=1)

    left, right = torch.rand(2, 3), torch.rand(2, 3)
    got = explain(Two().eval(), {"left": left, "right": right}, "saliency", of="right").attributions
    torch.testing.assert_close(got, left)
    torch.testing.assert_close(explain(Two().eval(), [left, right], "saliency", of="0").attributions, right)
    with pytest.raises(ExplainError, match="several inputs could be explained: left, right; say which"):
        explain(Two().eval(), {"left": left, "right": right}, "saliency")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "saliensy"}, "unknown method 'saliensy'; nearest: saliency"),
        ({"method": "integrated-gradients", "step": 3}, "no option 'step'; nearest: steps"),
        ({"method": "saliency", "layer": "conv"}, "method saliency has no option 'layer'"),
        ({"targets": 3}, "target 3 is out of range: the output has 3 classes"),
        ({"targets": [0, 1]}, r"one for each of 5 rows, got \[2\]"),
        ({"targets": 0.5}, "targets must be class indices"),
        ({"inputs": ROWS[:0]}, "the inputs have no rows"),
        ({"inputs": (ROWS * 255).byte()}, r"'0' is torch.uint8, and no Embedding takes it; .* x.float\(\)"),
        ({"output": "logit"}, "no float tensor 'logit'; it returns .*logits"),
        ({"output": None}, r"want an output \[N\] or \[N, C\], got \[1, 4, 8, 8\]"),
        ({"method": "occlusion", "window": 9}, r"window must be a size, or 2 of them, from 1 to at most \[8, 8\]"),
        ({"method": "occlusion", "window": 2, "stride": 3}, r"stride must be .* \(the window\), got 3"),
        ({"method": "gradcam", "layer": "head"}, r"'head' selects head \[1, 3\]; convolutions: conv, again"),
        ({"method": "integrated-gradients", "baseline": torch.zeros(3)}, r"like a row, \[2, 8, 8\], got \[3\]"),
        ({"method": "smoothgrad", "max_evaluations": 124}, "5 rows of 25 evaluations each are 125, at most 124"),
        ({"method": "integrated-gradients", "steps": 1001}, "steps must be from 1 to 1,000, got 1,001"),
        ({"chunk_rows": 0}, "must be positive"),
    ],
)
def test_what_does_not_fit_is_said(model, arguments, message):
    arguments = {"inputs": ROWS, "method": "saliency", "targets": 0, "output": "logits", **arguments}
    with pytest.raises(ExplainError, match=message):
        explain(model, **arguments)


def test_layers_that_do_not_fit_are_said(model):
    with pytest.raises(LayerError, match=r"'relu' is ambiguous, .* it selects relu#0, relu#1"):
        of(model, "gradcam", layer="relu")
    with pytest.raises(LayerError, match=r"no layer matches 'agian'; nearest: again"):
        of(model, "gradcam", layer="agian")
    with pytest.raises(LayerError, match="InPlace has no attention layer"):
        of(model, "attention-rollout")
    assert of(model, "gradcam", layer="relu#1").attributions.shape == (5, 8, 8)
    model.relu.train()
    with pytest.raises(ExplainError, match=r"relu is in training mode.*call model.eval\(\)"):
        of(model, "saliency")


def test_recurrent_layers_run_without_cudnn(one_thread):
    class Last(nn.Sequential):
        def forward(self, x):
            return self[0](x)[0][:, -1]

    seen = []
    model, x = Last(nn.GRU(3, 2, batch_first=True)).eval(), torch.rand(2, 4, 3)
    model.register_forward_hook(lambda *_: seen.append((torch.is_grad_enabled(), torch.backends.cudnn.enabled)))
    got = explain(model, x, "saliency", 0).attributions
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(got, torch.autograd.grad(model(leaf)[:, 0].sum(), leaf)[0].abs())
    assert seen[-2] == (True, False)
    assert torch.backends.cudnn.enabled


def test_a_model_without_gradients_is_told_so(one_thread):
    class Spoilt(nn.Sequential):
        def forward(self, x):
            y = super().forward(x).relu()
            y += 1
            return y

    class Detached(nn.Sequential):
        def forward(self, x):
            return super().forward(x).detach()

    x = torch.rand(2, 3)
    for kind, message in ((Spoilt, "changes in place what its gradients need"), (Detached, "carries no gradient")):
        model = kind(nn.Linear(3, 2)).eval()
        with pytest.raises(ExplainError, match=f"{message}.*occlusion needs none"):
            explain(model, x, "saliency", 0)
        assert explain(model, x, "occlusion", 0).attributions.shape == (2, 3)
