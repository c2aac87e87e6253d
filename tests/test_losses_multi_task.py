"""MultiTaskLoss against hand-computed sums and the formula of Kendall et al."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layercast.models.losses import FocalLoss, MultiTaskLoss, dice_loss


class TestMultiTask:
    outputs = (torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([1.5, -0.5]))
    targets = (torch.tensor([0, 0]), torch.tensor([1.0, 0.5]))
    criteria = (nn.CrossEntropyLoss(), F.mse_loss)
    # cross entropy: log(1 + e^-2) and log(1 + e); squared errors 0.25 and 1
    losses = ((math.log1p(math.exp(-2)) + math.log1p(math.e)) / 2, 0.625)

    @pytest.mark.parametrize("weights", [[0.5, 2.0], (0.5, 2.0), torch.tensor([0.5, 2.0])])
    def test_weighted_sum(self, weights: list[float] | Tensor) -> None:
        total = MultiTaskLoss(self.criteria, weights)(self.outputs, self.targets)
        assert total.item() == pytest.approx(0.5 * self.losses[0] + 2.0 * self.losses[1])

    def test_weights_default_to_1(self) -> None:
        assert MultiTaskLoss(self.criteria)(self.outputs, self.targets).item() == pytest.approx(sum(self.losses))

    def test_uncertainty_is_equation_10_of_kendall(self) -> None:
        module = MultiTaskLoss(self.criteria, [1.0, 1.0], ["classification", "regression"])
        sigmas = (0.5, 3.0)
        assert module.log_variance is not None
        with torch.no_grad():
            module.log_variance.copy_(torch.tensor([math.log(s**2) for s in sigmas]))
        expected = self.losses[0] / sigmas[0] ** 2 + math.log(sigmas[0])
        expected += self.losses[1] / (2 * sigmas[1] ** 2) + math.log(sigmas[1])
        assert module(self.outputs, self.targets).item() == pytest.approx(expected)

    def test_learned_variances_find_the_known_optimum(self) -> None:
        # d/ds (e^-s L + s/2) = 0 at s = log 2L, and of (e^-s L / 2 + s/2) at s = log L
        module = MultiTaskLoss(self.criteria, None, ["classification", "regression"])
        optimiser = torch.optim.SGD(module.parameters(), lr=0.5)
        for _ in range(200):
            optimiser.zero_grad()
            module(self.outputs, self.targets).backward()
            optimiser.step()
        assert module.log_variance is not None
        expected = [math.log(2 * self.losses[0]), math.log(self.losses[1])]
        assert module.log_variance.tolist() == pytest.approx(expected, abs=1e-4)

    def test_fixed_weights_have_no_parameters(self) -> None:
        assert list(MultiTaskLoss(self.criteria, [1.0, 1.0]).parameters()) == []

    @pytest.mark.parametrize("uncertainty", [None, ["classification", "regression"]])
    def test_wholly_ignored_task_adds_zero_with_finite_gradients(self, uncertainty: list[str] | None) -> None:
        module = MultiTaskLoss(self.criteria, [3.0, 1.0], uncertainty)  # type: ignore[arg-type]
        outputs = [self.outputs[0].clone().requires_grad_(), self.outputs[1].clone().requires_grad_()]
        total = module(outputs, [torch.tensor([-100, -100]), self.targets[1]])
        total.backward()
        assert total.item() == pytest.approx(self.losses[1] * (0.5 if uncertainty else 1.0))
        assert outputs[0].grad is not None
        assert outputs[1].grad is not None
        assert (outputs[0].grad == 0).all()
        assert (outputs[1].grad != 0).all()
        if module.log_variance is not None:
            assert module.log_variance.grad is not None
            assert module.log_variance.grad[0] == 0

    @pytest.mark.parametrize(
        "missing", [torch.full((2,), math.nan), torch.full((2,), -100.0), torch.tensor([math.nan, -100.0])]
    )
    def test_missing_regression_targets(self, missing: Tensor) -> None:
        total = MultiTaskLoss(self.criteria)(self.outputs, [self.targets[0], missing])
        assert total.item() == pytest.approx(self.losses[0])

    def test_no_targets_at_all(self) -> None:
        outputs = [torch.zeros(0, 2), self.outputs[1]]
        total = MultiTaskLoss(self.criteria)(outputs, [torch.zeros(0, dtype=torch.int64), self.targets[1]])
        assert total.item() == pytest.approx(self.losses[1])

    def test_unsigned_targets_are_not_the_ignored_index(self) -> None:
        # -100 as uint8 is 156.
        logits, classes = torch.randn(1, 200), torch.tensor([156], dtype=torch.uint8)
        total = MultiTaskLoss([FocalLoss(None, 0.0)])([logits], [classes])
        torch.testing.assert_close(total, F.cross_entropy(logits, classes.long()))

    def test_partly_ignored_task_still_counts(self) -> None:
        total = MultiTaskLoss(self.criteria)(self.outputs, [torch.tensor([0, -100]), self.targets[1]])
        assert total.item() == pytest.approx(math.log1p(math.exp(-2)) + self.losses[1])

    def test_a_real_nan_is_not_hidden(self) -> None:
        broken = torch.full((2, 2), math.nan)
        assert MultiTaskLoss(self.criteria)([broken, self.outputs[1]], self.targets).isnan()

    def test_focal_and_dice_as_criteria_move_with_the_module(self) -> None:
        module = MultiTaskLoss([FocalLoss([0.5, 0.5]), dice_loss]).to(torch.float64)
        assert {buffer.dtype for buffer in module.buffers()} == {torch.float64}
        total = module([self.outputs[0], torch.zeros(1, 3)], [self.targets[0], torch.zeros(1, 3)])
        assert total.isfinite()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (([],), "criteria: wanted at least one"),
            ((criteria, [1.0]), "weights: wanted one per task, 2, got 1"),
            ((criteria, [1.0, -1.0]), "weights: wanted .* numbers >= 0"),
            ((criteria, [1.0, math.inf]), "weights: wanted .* finite"),
            ((criteria, None, ["regression"]), "uncertainty: wanted one per task, 2, got 1"),
            ((criteria, None, ["regression", "ranking"]), "uncertainty: wanted each of .* got .*ranking"),
        ],
    )
    def test_arguments_are_validated(self, arguments: tuple[object, ...], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            MultiTaskLoss(*arguments)  # type: ignore[arg-type]

    def test_wrong_calls_are_refused(self) -> None:
        module = MultiTaskLoss([nn.CrossEntropyLoss(reduction="none"), F.mse_loss])
        with pytest.raises(ValueError, match=r"criteria\[0\]: wanted a scalar loss, got \[2\]; use a reduction"):
            module(self.outputs, self.targets)
        with pytest.raises(ValueError, match="outputs: wanted one per task, 2, got 1"):
            module(self.outputs[:1], self.targets)
        with pytest.raises(ValueError, match="targets: wanted one per task, 2, got 1"):
            module(self.outputs, self.targets[:1])
