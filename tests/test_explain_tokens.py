"""Explanations of token ids where the embedding is shared, changed in place, and padding is not masked by the model."""

import numpy as np
import pytest
import torch
from torch import nn

from layercast.models.explain import explain

PAD = 9


class Prompted(nn.Module):
    """Embeds a prompt with the same Embedding first, adds in place, and lets padding count."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4, padding_idx=PAD)
        self.head = nn.Linear(4, 3)

    def forward(self, ids, scale):
        prompt = self.embedding(torch.zeros_like(ids[:, :1]))
        x = self.embedding(ids)
        x += prompt
        return self.after(x, scale)

    def after(self, x, scale):
        return self.head((x.tanh() * scale[:, None, None]).sum(dim=1).tanh())


IDS = torch.tensor([[1, 2, 3, 4], [5, 6, PAD, PAD]])
INPUTS = {"ids": IDS, "scale": torch.tensor([1, 2])}
REAL = (IDS != PAD)[:, :, None]


@pytest.fixture
def model(one_thread):
    torch.manual_seed(0)
    model = Prompted().eval()
    nn.init.normal_(model.embedding.weight)  # also of the padding id: the model looks at it
    return model


def outputs(model, values):
    """What comes out where the Embedding gives `values` for the ids."""
    prompt = model.embedding.weight[0].detach()
    return model.after(values + prompt, INPUTS["scale"])[range(2), [2, 0]]


def gradient(model, values):
    leaf = values.detach().requires_grad_()
    return torch.autograd.grad(outputs(model, leaf).sum(), leaf)[0]


def test_gradients_are_of_the_right_call_and_not_of_padding(model):
    values = model.embedding.weight[IDS].detach()
    wanted = torch.where(REAL, gradient(model, values), 0)
    torch.testing.assert_close(explain(model, INPUTS, "saliency", [2, 0]).attributions, wanted.abs().sum(dim=2))
    torch.testing.assert_close(
        explain(model, INPUTS, "input-x-gradient", [2, 0]).attributions, (wanted * values).sum(2)
    )


def test_padding_is_given_no_noise(model):
    values, total = model.embedding.weight[IDS].detach(), 0
    for sample in range(3):
        noise = torch.from_numpy(np.random.Generator(np.random.PCG64([4, sample])).standard_normal((4, 4))).float()
        real = [row[keep[:, 0]] for row, keep in zip(values, REAL, strict=True)]
        spread = torch.stack([row.max() - row.min() for row in real])
        total = total + gradient(model, values + REAL * 0.1 * spread[:, None, None] * noise)
    got = explain(model, INPUTS, "smoothgrad", [2, 0], samples=3, noise=0.1, seed=4).attributions
    torch.testing.assert_close(got, torch.where(REAL, total / 3, 0).abs().sum(dim=2))


@pytest.mark.parametrize("baseline", [None, 7, torch.tensor([0.5, -1.0, 0.0, 2.0])], ids=["zeros", "id", "tensor"])
def test_integrated_gradients_keep_padding_at_both_ends(model, baseline):
    values, empty = model.embedding.weight[IDS].detach(), baseline
    if not isinstance(baseline, torch.Tensor):
        empty = torch.zeros(4) if baseline is None else model.embedding.weight[7].detach()
    difference = (outputs(model, values) - outputs(model, torch.where(REAL, empty, values))).detach()
    got = explain(model, INPUTS, "integrated-gradients", [2, 0], steps=64, baseline=baseline)
    torch.testing.assert_close(got.attributions.sum(dim=1), difference, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(got.delta, got.attributions.sum(dim=1) - difference, atol=1e-5, rtol=0)
    assert not got.attributions[1, 2:].any()


def test_occlusion_of_one_token_at_a_time(model):
    values = model.embedding.weight[IDS].detach()
    got = explain(model, INPUTS, "occlusion", [2, 0]).attributions
    for place in range(4):
        without = values.clone()
        without[:, place] = 0
        fall = (outputs(model, values) - outputs(model, without)).detach()
        torch.testing.assert_close(got[:, place], torch.where(REAL[:, place, 0], fall, 0))


def test_a_mask_given_overrides_the_padding_id(model):
    mask = torch.ones(2, 4, dtype=torch.bool)
    values = model.embedding.weight[IDS].detach()
    got = explain(model, INPUTS, "saliency", [2, 0], token_mask=mask).attributions
    torch.testing.assert_close(got, gradient(model, values).abs().sum(dim=2))
    with pytest.raises(ValueError, match=r"token_mask must be boolean \[2, 4\], got torch.bool \[2, 3\]"):
        explain(model, INPUTS, "saliency", [2, 0], token_mask=mask[:, :3])
    with pytest.raises(ValueError, match="baseline 10 is no token id; ids are below 10"):
        explain(model, INPUTS, "occlusion", [2, 0], baseline=10)
