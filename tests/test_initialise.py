"""Initialisers: bounds and spreads from the papers' formulas, and which parameters they reach."""

import math

import pytest
import torch
from torch import Tensor, nn

from layercast.models.initialise import initialise, initialiser, names
from layercast.models.layers import Linear, MultiHeadAttention

FAN_IN, FAN_OUT = 300, 700


def filled(name: str, **options: float | str) -> Tensor:
    layer = nn.Linear(FAN_IN, FAN_OUT)
    initialise(layer, initialiser(name, **options), seed=0)
    return layer.weight.detach()


@pytest.mark.parametrize(
    ("name", "std", "bound"),
    [
        # Glorot and Bengio 2010: variance 2 / (in + out). He et al. 2015: variance 2 / in.
        ("xavier_uniform", math.sqrt(2 / (FAN_IN + FAN_OUT)), math.sqrt(6 / (FAN_IN + FAN_OUT))),
        ("xavier_normal", math.sqrt(2 / (FAN_IN + FAN_OUT)), math.inf),
        ("kaiming_uniform", math.sqrt(2 / FAN_IN), math.sqrt(6 / FAN_IN)),
        ("kaiming_normal", math.sqrt(2 / FAN_IN), math.inf),
        ("normal", 0.01, math.inf),
        ("truncated_normal", 0.02, 2.0),
    ],
)
def test_spread_of_random_ones(name: str, std: float, bound: float) -> None:
    weight = filled(name)
    count = weight.numel()
    assert weight.std().item() == pytest.approx(std, rel=0.01)
    assert abs(weight.mean().item()) < 4 * std / math.sqrt(count)
    assert weight.abs().max().item() <= bound
    # Four standard deviations tell a normal from a uniform, whose largest is 1.73 of them.
    assert (weight.abs().max().item() > 3.5 * std) is (not name.endswith("_uniform"))


def test_fixed_ones() -> None:
    assert (filled("zeros") == 0).all()
    assert (filled("ones") == 1).all()
    assert (filled("constant", val=-0.25) == -0.25).all()


def test_options() -> None:
    assert filled("normal", mean=3.0, std=0.5).mean().item() == pytest.approx(3.0, abs=0.01)
    assert filled("xavier_normal", gain=2.0).std().item() == pytest.approx(2 * math.sqrt(2 / 1000), rel=0.01)
    assert filled("kaiming_normal", mode="fan_out").std().item() == pytest.approx(math.sqrt(2 / FAN_OUT), rel=0.01)
    assert filled("kaiming_normal", a=1.0).std().item() == pytest.approx(math.sqrt(1 / FAN_IN), rel=0.01)
    two_sigma = filled("truncated_normal", a=-0.04, b=0.04)
    assert two_sigma.abs().max().item() <= 0.04
    # A normal cut at two sigma: variance 1 - 4 φ(2) / (2 Φ(2) - 1)
    cut = 1 - 4 * math.exp(-2) / math.sqrt(2 * math.pi) / math.erf(math.sqrt(2))
    assert two_sigma.std().item() == pytest.approx(0.02 * math.sqrt(cut), rel=0.01)


def test_convolution_counts_its_kernel_into_the_fan() -> None:
    layer = initialise(nn.Conv2d(64, 128, 3), "kaiming_normal", seed=1)
    assert layer.weight.std().item() == pytest.approx(math.sqrt(2 / (64 * 9)), rel=0.02)


def test_every_name_works() -> None:
    kaiming_and_xavier = [f"{family}_{kind}" for family in ("kaiming", "xavier") for kind in ("normal", "uniform")]
    assert names() == sorted([*kaiming_and_xavier, "zeros", "ones", "constant", "normal", "truncated_normal"])
    for name in names():
        rule = initialiser(name, val=1.0) if name == "constant" else name
        assert initialise(nn.Linear(3, 4), rule).weight.isfinite().all()


def small_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 4), nn.LayerNorm(4), Linear(4, 3)
    )


def test_one_name_goes_to_matrices_and_leaves_norms_alone() -> None:
    net = small_net()
    for index in (1, 4):
        nn.init.constant_(net[index].weight, 5.0)
        nn.init.constant_(net[index].bias, 6.0)
    initialise(net, initialiser("constant", val=0.5))
    for index in (0, 3, 5):
        assert (net[index].weight == 0.5).all()
        assert (net[index].bias == 0).all()
    for index in (1, 4):
        assert (net[index].weight == 5.0).all()
        assert (net[index].bias == 6.0).all()


def test_mapping_goes_by_type_the_most_specific_first() -> None:
    class Special(nn.Linear):
        pass

    net = nn.Sequential(nn.Linear(2, 2), Special(2, 2), nn.Conv1d(2, 2, 1), nn.BatchNorm1d(2))
    before = net[2].weight.clone()
    initialise(
        net, {nn.Linear: "ones", Special: "zeros", nn.BatchNorm1d: initialiser("constant", val=0.1)}, bias="ones"
    )
    assert (net[0].weight == 1).all()
    assert (net[1].weight == 0).all()
    assert torch.equal(net[2].weight, before)
    assert net[3].weight.tolist() == pytest.approx([0.1, 0.1])
    assert (net[3].bias == 1).all()


def test_attention_projections_and_torch_attention_are_matrices() -> None:
    ours = initialise(MultiHeadAttention(4, 2), "ones", bias="zeros")
    assert all((p == (0 if name.endswith("bias") else 1)).all() for name, p in ours.named_parameters())
    theirs = initialise(nn.MultiheadAttention(4, 2), "ones", bias="zeros")
    assert all((p == (0 if name.endswith("bias") else 1)).all() for name, p in theirs.named_parameters())


def test_seed_fixes_the_values_and_leaves_torchs_generator_alone() -> None:
    state = torch.get_rng_state()
    first, again, other = (initialise(small_net_of(state), "xavier_normal", seed=s) for s in (7, 7, 8))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first[3].weight, again[3].weight)
    assert not torch.equal(first[3].weight, other[3].weight)


def small_net_of(state: Tensor) -> nn.Sequential:
    """A net whose own construction leaves the generator as it was."""
    net = small_net()
    torch.set_rng_state(state)
    return net


def test_seed_gives_the_values_of_torchs_function_in_every_dtype() -> None:
    expected = nn.init.kaiming_uniform_(torch.empty(5, 3), generator=torch.Generator().manual_seed(3))
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        layer = initialise(nn.Linear(3, 5, dtype=dtype), "kaiming_uniform", seed=3)
        assert torch.equal(layer.weight.detach(), expected.to(dtype))


def test_without_a_seed_torchs_generator_is_used() -> None:
    layer = nn.Linear(3, 5)
    torch.manual_seed(11)
    initialise(layer, "normal")
    torch.manual_seed(11)
    assert torch.equal(layer.weight.detach(), torch.empty(5, 3).normal_(0, 0.01))


def test_shared_parameter_is_filled_once() -> None:
    embedding, head, last = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False), nn.Linear(4, 6, bias=False)
    head.weight = embedding.weight
    initialise(nn.Sequential(embedding, head, last), "normal", seed=0)
    one, two = torch.empty(6, 4), torch.empty(6, 4)
    generator = torch.Generator().manual_seed(0)
    one.normal_(0, 0.01, generator=generator)
    two.normal_(0, 0.01, generator=generator)
    assert torch.equal(embedding.weight.detach(), one)
    assert torch.equal(last.weight.detach(), two)
    assert head.weight is embedding.weight


def test_padding_row_stays_zero_and_frozen_parameters_are_filled() -> None:
    embedding = nn.Embedding(5, 3, padding_idx=2).requires_grad_(False)
    initialise(embedding, "ones")
    assert embedding.weight.tolist() == [[1.0] * 3, [1.0] * 3, [0.0] * 3, [1.0] * 3, [1.0] * 3]
    assert not embedding.weight.requires_grad


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("xavier_unifrom", {}, "unknown initialiser 'xavier_unifrom'; did you mean 'xavier_uniform'.*kaiming_normal"),
        ("qqq", {}, r"unknown initialiser 'qqq'\. Known: constant, kaiming_normal"),
        ("normal", {"sigma": 1.0}, "normal: unknown option 'sigma'; known: mean, std"),
        ("zeros", {"val": 1.0}, "zeros: unknown option 'val'; known: none"),
        ("constant", {}, "constant: val is missing"),
        ("normal", {"std": -1.0}, "normal: std must be at least 0, got -1"),
        ("truncated_normal", {"a": 1.0, "b": 1.0}, r"truncated_normal: a \(1.0\) must be below b"),
    ],
)
def test_wrong_names_and_options_are_refused(name: str, options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        initialiser(name, **options)


def test_a_rule_that_cannot_fill_names_the_parameter() -> None:
    with pytest.raises(ValueError, match=r"1\.weight \[4\]: Fan in and fan out"):
        initialise(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), {nn.BatchNorm1d: "xavier_normal"})
    with pytest.raises(ValueError, match="weight: is lazy, without a shape yet; run the model once"):
        initialise(nn.LazyLinear(3), "ones")


def test_nothing_to_fill_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no parameter initialised: Sequential has no .* of type Conv2d"):
        initialise(nn.Sequential(nn.Linear(2, 2)), {nn.Conv2d: "ones"})
