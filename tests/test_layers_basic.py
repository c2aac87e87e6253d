"""CenteredLayer, Linear, RunningNorm, activations and dropouts against torch's own and hand-computed values."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layercast.models.layers import CenteredLayer, Linear, RunningNorm, activation
from layercast.models.layers.activations import ACTIVATIONS, dropout_for


class TestCenteredLayer:
    def test_hand_computed(self) -> None:
        x = torch.tensor([[1.0, 2.0, 6.0], [-1.0, 0.0, 1.0]])
        assert CenteredLayer()(x).tolist() == [[-2.0, -1.0, 3.0], [-1.0, 0.0, 1.0]]

    def test_what_shares_a_batch_changes_no_answer(self) -> None:
        x = torch.randn(4, 7)
        together = CenteredLayer()(x)
        assert torch.equal(together[:1], CenteredLayer()(x[:1]))

    def test_has_no_state(self) -> None:
        assert CenteredLayer().state_dict() == {}

    def test_higher_ranks_and_gradient(self) -> None:
        x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
        torch.testing.assert_close(CenteredLayer()(x).mean(-1), torch.zeros(2, 3, dtype=torch.float64))
        assert torch.autograd.gradcheck(CenteredLayer(), (x,))


class TestLinear:
    def test_hand_computed(self) -> None:
        layer = Linear(2, 3)
        layer.load_state_dict(
            {"weight": torch.tensor([[1.0, 2], [3, 4], [5, 6]]), "bias": torch.tensor([10.0, 20, 30])}
        )
        assert layer(torch.tensor([[1.0, -1.0]])).tolist() == [[9.0, 19.0, 29.0]]

    @pytest.mark.parametrize("bias", [True, False])
    def test_equals_torch_with_its_state_dict_in_value_and_gradient(self, bias: bool) -> None:
        ours, theirs = Linear(5, 4, bias), nn.Linear(5, 4, bias)
        ours.load_state_dict(theirs.state_dict())
        x = torch.randn(3, 2, 5)
        torch.testing.assert_close(ours(x), theirs(x))
        ours(x).square().sum().backward()
        theirs(x).square().sum().backward()
        for name, parameter in ours.named_parameters():
            torch.testing.assert_close(parameter.grad, theirs.get_parameter(name).grad)

    def test_starts_with_the_values_of_torchs_linear(self) -> None:
        torch.manual_seed(5)
        ours = Linear(6, 4)
        torch.manual_seed(5)
        theirs = nn.Linear(6, 4)
        torch.testing.assert_close(ours.weight, theirs.weight)
        torch.testing.assert_close(ours.bias, theirs.bias)

    def test_repr_and_parameters(self) -> None:
        assert repr(Linear(2, 3)) == "Linear(in_features=2, out_features=3, bias=True)"
        assert [(name, tuple(p.shape)) for name, p in Linear(2, 3).named_parameters()] == [
            ("weight", (3, 2)),
            ("bias", (3,)),
        ]
        assert list(Linear(2, 3, bias=False).state_dict()) == ["weight"]


class TestRunningNorm:
    @pytest.mark.parametrize("momentum", [0.1, 0.5, 1.0])
    @pytest.mark.parametrize("eps", [1e-5, 0.1])
    def test_many_steps_against_batch_norm(self, momentum: float, eps: float) -> None:
        rows, features, steps = 6, 4, 40
        ours = RunningNorm(features, momentum, eps).double()
        theirs = nn.BatchNorm1d(features, eps, momentum, affine=False).double()
        start_left = 1.0
        torch.manual_seed(0)
        for _ in range(steps):
            x = torch.randn(rows, features, dtype=torch.float64) * 3 + 2
            torch.testing.assert_close(ours(x), theirs(x))
            torch.testing.assert_close(ours.running_mean, theirs.running_mean)
            # torch folds the unbiased variance in: its running value is the start's rest plus n / (n - 1) times ours.
            start_left *= 1 - momentum
            biased = (theirs.running_var - start_left) * (rows - 1) / rows + start_left
            torch.testing.assert_close(ours.running_var, biased)
        theirs.running_var = ours.running_var.clone()
        ours.eval()
        theirs.eval()
        x = torch.randn(1, features, dtype=torch.float64)
        torch.testing.assert_close(ours(x), theirs(x))

    def test_batches_of_different_sizes_against_numpy(self) -> None:
        generator = np.random.default_rng(1)
        layer, mean, variance = RunningNorm(3, momentum=0.2).double(), np.zeros(3), np.ones(3)
        for rows in (2, 9, 5, 2, 30):
            x = generator.normal(5, 2, (rows, 3))
            expected = (x - x.mean(0)) / np.sqrt(((x - x.mean(0)) ** 2).mean(0) + 1e-5)
            np.testing.assert_allclose(layer(torch.from_numpy(x)).numpy(), expected, atol=1e-12)
            mean = 0.8 * mean + 0.2 * x.mean(0)
            variance = 0.8 * variance + 0.2 * ((x - x.mean(0)) ** 2).mean(0)
        np.testing.assert_allclose(layer.running_mean.numpy(), mean)
        np.testing.assert_allclose(layer.running_var.numpy(), variance)
        x = generator.normal(5, 2, (4, 3))
        expected = (x - mean) / np.sqrt(variance + 1e-5)
        np.testing.assert_allclose(layer.eval()(torch.from_numpy(x)).numpy(), expected)

    def test_gradient_flows_through_the_batch_statistics(self) -> None:
        x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
        weights = torch.randn(5, 3, dtype=torch.float64)
        (RunningNorm(3).double()(x) * weights).sum().backward()
        ours, x.grad = x.grad, None
        (F.batch_norm(x, None, None, training=True) * weights).sum().backward()
        torch.testing.assert_close(ours, x.grad)

    def test_eval_does_not_move_the_statistics(self) -> None:
        layer = RunningNorm(3).eval()
        layer(torch.randn(5, 3))
        assert layer.running_mean.tolist() == [0.0] * 3
        assert layer.running_var.tolist() == [1.0] * 3

    def test_statistics_are_buffers_without_gradient_or_graph(self) -> None:
        layer = RunningNorm(3)
        layer(torch.randn(5, 3, requires_grad=True))
        assert list(layer.parameters()) == []
        assert set(layer.state_dict()) == {"running_mean", "running_var"}
        assert not any(buffer.requires_grad for buffer in layer.buffers())
        copy = RunningNorm(3)
        copy.load_state_dict(layer.state_dict())
        assert torch.equal(copy.running_var, layer.running_var)
        assert layer.half().running_mean.dtype == torch.float16

    @pytest.mark.parametrize("rows", [0, 1])
    def test_training_on_too_few_rows_is_refused(self, rows: int) -> None:
        with pytest.raises(ValueError, match=f"RunningNorm: training needs at least 2 rows a batch, got {rows}"):
            RunningNorm(3)(torch.randn(rows, 3))

    @pytest.mark.parametrize("shape", [(4, 2), (4,), (4, 3, 1)])
    def test_other_shapes_are_refused(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match=r"RunningNorm: want \[N, 3\], got \[4"):
            RunningNorm(3)(torch.randn(shape))


class TestActivations:
    @pytest.mark.parametrize(
        ("name", "function"),
        [
            ("relu", lambda v: max(v, 0.0)),
            ("relu6", lambda v: min(max(v, 0.0), 6.0)),
            ("leaky_relu", lambda v: v if v > 0 else 0.01 * v),
            ("prelu", lambda v: v if v > 0 else 0.25 * v),
            ("elu", lambda v: v if v > 0 else math.exp(v) - 1),
            ("gelu", lambda v: v * 0.5 * (1 + math.erf(v / math.sqrt(2)))),
            ("selu", lambda v: 1.0507009873554805 * (v if v > 0 else 1.6732632423543772 * (math.exp(v) - 1))),
            ("sigmoid", lambda v: 1 / (1 + math.exp(-v))),
            ("tanh", math.tanh),
            ("silu", lambda v: v / (1 + math.exp(-v))),
        ],
    )
    def test_formula(self, name: str, function: object) -> None:
        assert callable(function)
        values = [-8.0, -1.5, -0.1, 0.0, 0.7, 3.0, 9.0]
        got = activation(name)(torch.tensor(values)).tolist()
        assert got == pytest.approx([function(v) for v in values], abs=1e-6)

    def test_softmax_is_over_the_last_dimension(self) -> None:
        x = torch.randn(2, 3, 4)
        exps = x.exp()
        torch.testing.assert_close(activation("softmax")(x), exps / exps.sum(-1, keepdim=True))
        torch.testing.assert_close(activation("log_softmax")(x).exp(), activation("softmax")(x))

    def test_all_names_are_known_and_fresh_every_time(self) -> None:
        assert set(ACTIVATIONS) == {
            *("relu", "relu6", "leaky_relu", "prelu", "elu", "gelu", "selu"),
            *("sigmoid", "tanh", "softmax", "log_softmax", "silu"),
        }
        assert all(activation(name) is not activation(name) for name in ACTIVATIONS)
        assert isinstance(activation("Leaky-ReLU"), nn.LeakyReLU)

    @pytest.mark.parametrize("name", ["reluu", "swish", ""])
    def test_unknown_name_lists_the_known_ones(self, name: str) -> None:
        with pytest.raises(
            ValueError, match=f"unknown activation {name!r}.*Known: relu, relu6, leaky_relu.*silu"
        ) as error:
            activation(name)
        assert ("did you mean 'relu'?" in str(error.value)) is (name == "reluu")


class TestDropout:
    def test_selu_goes_with_alpha_dropout(self) -> None:
        assert type(dropout_for("selu", 0.1)) is nn.AlphaDropout
        assert type(dropout_for("SELU", 0.1)) is nn.AlphaDropout
        assert type(dropout_for("relu", 0.1)) is nn.Dropout

    @pytest.mark.parametrize("name", ["selu", "relu"])
    def test_acts_in_training_only(self, name: str) -> None:
        torch.manual_seed(0)
        layer, x = dropout_for(name, 0.25), torch.ones(20_000)
        changed = (
            (layer(x) != layer.eval()(x)).float().mean().item() if name == "selu" else (layer(x) == 0).float().mean()
        )
        assert torch.equal(layer.eval()(x), x)
        assert torch.as_tensor(changed).item() > 0.2

    def test_alpha_dropout_keeps_mean_and_variance(self) -> None:
        torch.manual_seed(0)
        out = dropout_for("selu", 0.3)(torch.randn(200_000))
        assert out.mean().item() == pytest.approx(0.0, abs=0.02)
        assert out.std().item() == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Linear(0, 3), "Linear: in_features must be a positive whole number, got 0"),
        (lambda: Linear(3, -1), "Linear: out_features must be a positive whole number, got -1"),
        (lambda: Linear(3, 2.0), "Linear: out_features must be a positive whole number, got 2.0"),  # type: ignore[arg-type]
        (lambda: Linear(True, 2), "Linear: in_features must be a positive whole number, got True"),
        (lambda: RunningNorm(0), "RunningNorm: num_features must be a positive whole number, got 0"),
        (lambda: RunningNorm(3, momentum=0.0), "RunningNorm: momentum must be above 0 and at most 1, got 0.0"),
        (lambda: RunningNorm(3, momentum=1.5), "RunningNorm: momentum must be above 0 and at most 1, got 1.5"),
        (lambda: RunningNorm(3, momentum=math.nan), "RunningNorm: momentum must be above 0"),
        (lambda: RunningNorm(3, momentum=None), "RunningNorm: momentum must be above 0 and at most 1, got None"),  # type: ignore[arg-type]
        (lambda: RunningNorm(3, eps="small"), "RunningNorm: eps must be above 0, got 'small'"),  # type: ignore[arg-type]
        (lambda: RunningNorm(3, eps=0.0), "RunningNorm: eps must be above 0, got 0.0"),
        (lambda: RunningNorm(3, eps=math.nan), "RunningNorm: eps must be above 0, got nan"),
    ],
)
def test_constructor_arguments_are_validated(build: object, message: str) -> None:
    assert callable(build)
    with pytest.raises(ValueError, match=message):
        build()


def test_running_norm_under_autocast_answers_as_in_float32() -> None:
    torch.manual_seed(0)
    first, second = RunningNorm(8), RunningNorm(8)
    x: Tensor = torch.randn(16, 8) * 50
    with torch.autocast("cpu", torch.bfloat16):
        low = first(x.bfloat16())
    torch.testing.assert_close(low.float(), second(x), atol=0.05, rtol=0.05)
    torch.testing.assert_close(first.running_var, second.running_var, rtol=0.02, atol=0.02)
