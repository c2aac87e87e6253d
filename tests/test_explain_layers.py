"""Grad-CAM of networks other than image classifiers, and explanations in half and double precision."""

import pytest
import torch
from torch import nn

from layercast.models.explain import METHODS, ExplainError, explain


class TextConvolution(nn.Module):
    """Ids [N, T] -> convolution over time -> logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4, padding_idx=0)
        self.norm = nn.LayerNorm(4)
        self.conv = nn.Conv1d(4, 6, 3, padding=1)
        self.head = nn.Linear(6, 2)

    def forward(self, ids):
        x = self.norm(self.embedding(ids))
        return self.head(self.conv(x.transpose(1, 2)).relu().mean(dim=2))


@pytest.fixture
def text(one_thread):
    torch.manual_seed(0)
    return TextConvolution().eval()


IDS = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 0, 0]])


def test_grad_cam_of_a_convolution_over_tokens(text):
    with torch.no_grad():
        maps = text.conv(text.norm(text.embedding(IDS)).transpose(1, 2))
    gradients = text.head.weight[1].detach()[None, :, None] * (maps > 0) / 5
    wanted = (gradients.mean(dim=2, keepdim=True) * maps).sum(dim=1).relu()
    assert wanted.any()
    torch.testing.assert_close(explain(text, IDS, "gradcam", 1).attributions, wanted.masked_fill(IDS == 0, 0))


def test_tokens_are_no_channels(text):
    with pytest.raises(ExplainError, match=r"'norm' selects norm \[1, 5, 4\]; convolutions: conv"):
        explain(text, IDS, "gradcam", layer="norm")
    with pytest.raises(ExplainError, match="the model has none; try integrated-gradients"):
        explain(nn.Linear(2, 2).eval(), torch.rand(1, 2), "gradcam")


def test_a_map_that_does_not_fit_the_input_is_given_as_it_is():
    model = nn.Sequential(nn.Unflatten(1, (1, 4, 4)), nn.Conv2d(1, 2, 1), nn.Flatten(), nn.Linear(32, 2)).eval()
    with pytest.raises(ExplainError, match=r"a map of \[4, 4\] can't be brought to .* \[16\]; .* upsample=False"):
        explain(model, torch.rand(3, 16), "gradcam")
    assert explain(model, torch.rand(3, 16), "gradcam", upsample=False).attributions.shape == (3, 4, 4)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "attention-rollout"])
def test_halves_and_doubles(method, one_thread):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.GELU(), nn.Flatten(), nn.Linear(48, 2)).double().eval()
    x = torch.rand(2, 1, 6, 6).double()
    exact = explain(model, x, method, 0)
    assert exact.attributions.dtype == torch.float64
    half = explain(model.to(torch.bfloat16), x.to(torch.bfloat16), method, 0)
    assert half.attributions.dtype == torch.float32
    # Occlusion is the difference of two scores in bfloat16, whose steps near 1 are 1/128.
    torch.testing.assert_close(half.attributions.double(), exact.attributions, atol=0.02, rtol=0.1)
    if method == "integrated-gradients":
        assert exact.delta.abs().max() < 1e-9
