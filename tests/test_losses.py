"""Losses against hand-computed values, the papers' formulas in plain Python, and torch's own losses."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layercast.models.losses import FocalLoss, MultiTaskLoss, dice_loss


def logit(*probabilities: float) -> Tensor:
    return torch.logit(torch.tensor(probabilities, dtype=torch.float64))


def dice_by_hand(scores: list[float], truth: list[float], smooth: float) -> float:
    overlap = sum(s * t for s, t in zip(scores, truth, strict=True))
    return 1 - (2 * overlap + smooth) / (sum(scores) + sum(truth) + smooth)


class TestDice:
    def test_hand_computed_binary_case(self) -> None:
        # |A ∩ B| = 0.75, |A| = 1.25, |B| = 1: 1 - (1.5 + 1) / (2.25 + 1)
        loss = dice_loss(logit(0.75, 0.25, 0.25).reshape(1, 3), torch.tensor([[1, 0, 0]]))
        assert loss.item() == pytest.approx(1 - 2.5 / 3.25)

    def test_is_per_sample_then_mean_not_pooled_over_the_batch(self) -> None:
        logits = logit(0.9, 0.9, 0.9, 0.9, 0.1, 0.5, 0.5, 0.5).reshape(2, 4)
        targets = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]])
        first = dice_by_hand([0.9] * 4, [1.0] * 4, 1.0)
        second = dice_by_hand([0.1, 0.5, 0.5, 0.5], [1.0, 0, 0, 0], 1.0)
        pooled = dice_by_hand([0.9] * 4 + [0.1, 0.5, 0.5, 0.5], [1.0] * 5 + [0.0] * 3, 1.0)
        loss = dice_loss(logits, targets).item()
        assert loss == pytest.approx((first + second) / 2)
        assert abs(loss - pooled) > 0.05
        assert dice_loss(logits, targets, reduction="none").tolist() == pytest.approx([first, second])
        assert dice_loss(logits, targets, reduction="sum").item() == pytest.approx(first + second)

    def test_multi_class_is_the_mean_over_classes_of_each_sample(self) -> None:
        torch.manual_seed(0)
        logits, targets = torch.randn(3, 4, 2, 5, dtype=torch.float64), torch.randint(0, 4, (3, 2, 5))
        expected = []
        for row in range(3):
            per_class = []
            for c in range(4):
                scores, truth = [], []
                for y in range(2):
                    for x in range(5):
                        exps = [math.exp(v) for v in logits[row, :, y, x].tolist()]
                        scores.append(exps[c] / sum(exps))
                        truth.append(float(targets[row, y, x].item() == c))
                per_class.append(dice_by_hand(scores, truth, 0.5))
            expected.append(sum(per_class) / 4)
        assert dice_loss(logits, targets, smooth=0.5, reduction="none").tolist() == pytest.approx(expected)

    @pytest.mark.parametrize("smooth", [0.0, 1.0])
    def test_empty_mask_with_empty_prediction_is_perfect(self, smooth: float) -> None:
        logits = torch.full((2, 1, 4, 4), -1e4, requires_grad=True)
        loss = dice_loss(logits, torch.zeros(2, 1, 4, 4), smooth)
        loss.backward()
        assert loss.item() == 0.0
        assert logits.grad is not None
        assert logits.grad.isfinite().all()

    def test_empty_mask_with_some_prediction_costs_by_its_size(self) -> None:
        loss = dice_loss(logit(0.5, 0.5, 0.5).reshape(1, 3), torch.zeros(1, 3))
        assert loss.item() == pytest.approx(1 - 1 / 2.5)

    def test_perfect_and_opposite_predictions(self) -> None:
        mask = torch.tensor([[1.0, 0.0, 1.0, 0.0]])
        assert dice_loss(mask * 2e4 - 1e4, mask).item() == pytest.approx(0.0)
        assert dice_loss(1e4 - mask * 2e4, mask, smooth=0.0).item() == pytest.approx(1.0)

    @pytest.mark.parametrize("binary", [True, False])
    def test_ignored_positions_count_for_nothing(self, binary: bool) -> None:
        torch.manual_seed(1)
        logits = torch.randn((1, 6) if binary else (1, 3, 6), requires_grad=True)
        targets = torch.tensor([[1, 0, 1, 1, 0, 1]])
        targets[0, 3:] = -100
        loss = dice_loss(logits, targets)
        loss.backward()
        assert loss.item() == pytest.approx(dice_loss(logits[..., :3], targets[..., :3]).item())
        assert logits.grad is not None
        assert (logits.grad[..., 3:] == 0).all()
        assert (logits.grad[..., :3] != 0).any()

    def test_everything_ignored_is_zero(self) -> None:
        logits = torch.randn(2, 3, 4, requires_grad=True)
        loss = dice_loss(logits, torch.full((2, 4), -100))
        loss.backward()
        assert loss.item() == 0.0
        assert logits.grad is not None
        assert (logits.grad == 0).all()

    def test_half_logits_of_a_mask_too_large_for_half_sums(self) -> None:
        mask = torch.ones(1, 1, 300, 300, dtype=torch.float16)  # 90,000 > 65,504
        assert dice_loss(mask * 100, mask).item() == pytest.approx(0.0, abs=1e-6)

    def test_channel_may_be_left_out_of_binary_targets(self) -> None:
        logits, targets = torch.randn(2, 1, 3, 3), torch.randint(0, 2, (2, 3, 3))
        assert dice_loss(logits, targets) == dice_loss(logits, targets.unsqueeze(1))

    def test_boolean_targets(self) -> None:
        logits, targets = torch.randn(2, 5), torch.rand(2, 5) > 0.5
        assert dice_loss(logits, targets) == dice_loss(logits, targets.float())

    @pytest.mark.parametrize("multi_class", [True, False])
    def test_gradient_is_that_of_finite_differences(self, multi_class: bool) -> None:
        torch.manual_seed(2)
        logits = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
        targets = torch.randint(0, 3, (2, 4)) if multi_class else torch.randint(0, 2, (2, 3, 4))
        assert torch.autograd.gradcheck(lambda x: dice_loss(x, targets), (logits,))

    def test_empty_batch_is_zero(self) -> None:
        assert dice_loss(torch.zeros(0, 3, 4), torch.zeros(0, 4, dtype=torch.int64)).item() == 0.0


LOSSES = [dice_loss, FocalLoss()]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    ("logits", "targets", "message"),
    [
        (torch.zeros(2, 3, 4), torch.zeros(2, 5, dtype=torch.int64), r"wanted \[2, 3, 4\].*or \[2, 4\].*got \[2, 5\]"),
        (torch.zeros(2, 3, 4), torch.zeros(2, 4), r"wanted integers, class indices 0\.\.2, got torch\.float32"),
        (torch.zeros(2, 3, 4), torch.full((2, 4), 3), r"0\.\.2, got 3\.\.3; logits \[2, 3, 4\] have 3 classes"),
        (torch.zeros(2, 3, 4), torch.full((2, 4), -1), r"0\.\.2, got -1"),
        (torch.zeros(2, 4), torch.full((2, 4), 255), r"0\.\.1, got 255\.\.255; divide a 0/255 mask by 255"),
        (torch.zeros(2, 4), torch.full((2, 4), math.nan), r"0\.\.1, got nan"),
        (torch.zeros(2, 4, dtype=torch.int64), torch.zeros(2, 4), r"logits: wanted floats"),
    ],
)
def test_wrong_logits_and_targets_are_refused(loss: object, logits: Tensor, targets: Tensor, message: str) -> None:
    assert callable(loss)
    with pytest.raises(ValueError, match=message):
        loss(logits, targets)


def test_dice_arguments_are_validated() -> None:
    with pytest.raises(ValueError, match="smooth: wanted a finite number >= 0, got -1"):
        dice_loss(torch.zeros(1, 2), torch.zeros(1, 2), smooth=-1)
    with pytest.raises(ValueError, match="reduction: wanted one of mean, sum, none, got 'max'"):
        dice_loss(torch.zeros(1, 2), torch.zeros(1, 2), reduction="max")  # type: ignore[arg-type]


def focal_by_hand(logits: list[float], target: int, alpha: float, gamma: float) -> float:
    exps = [math.exp(v) for v in logits]
    p = exps[target] / sum(exps)
    return -alpha * (1 - p) ** gamma * math.log(p)


class TestFocalMultiClass:
    logits = torch.tensor(
        [[0.3, -1.2, 2.0, 0.1, 0.4], [1.0, 0.0, -1.0, 0.5, 0.2], [0.0, 0.0, 0.7, 0.0, -2.0], [2.0, 1.0, 0.5, 0.1, 3.0]],
        dtype=torch.float64,
    )
    targets = torch.tensor([0, 4, 2, 2])

    @pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 5.0])
    @pytest.mark.parametrize("alpha", [None, 0.25, [0.1, 0.2, 0.3, 0.4, 2.0]])
    def test_formula(self, gamma: float, alpha: float | list[float] | None) -> None:
        def weight(target: int) -> float:
            return alpha[target] if isinstance(alpha, list) else 1.0 if alpha is None else alpha

        rows = zip(self.logits.tolist(), self.targets.tolist(), strict=True)
        expected = [focal_by_hand(row, target, weight(target), gamma) for row, target in rows]
        loss = FocalLoss(alpha, gamma, reduction="none")(self.logits, self.targets)
        assert loss.tolist() == pytest.approx(expected, rel=1e-6)
        assert (loss > 0).all()  # an alpha made from the class index is negative beyond two classes
        assert FocalLoss(alpha, gamma)(self.logits, self.targets).item() == pytest.approx(sum(expected) / 4, rel=1e-6)
        summed = FocalLoss(alpha, gamma, reduction="sum")(self.logits, self.targets)
        assert summed.item() == pytest.approx(sum(expected), rel=1e-6)

    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    def test_gamma_0_without_alpha_is_cross_entropy(self, reduction: str) -> None:
        torch.manual_seed(0)
        logits, targets = torch.randn(6, 4, 3, 2), torch.randint(0, 4, (6, 3, 2))
        targets[0] = -100
        expected = F.cross_entropy(logits, targets, reduction=reduction)
        loss = FocalLoss(None, 0.0, reduction)(logits, targets)  # type: ignore[arg-type]
        torch.testing.assert_close(loss, expected)

    def test_published_example(self) -> None:
        # Lin et al., section 3.2: with gamma 2 an example at p = 0.9 loses 100 times less than with cross entropy.
        logits, targets = torch.log(torch.tensor([[0.9, 0.06, 0.04]])), torch.tensor([0])
        focal, entropy = FocalLoss(None, 2.0)(logits, targets), F.cross_entropy(logits, targets)
        assert (entropy / focal).item() == pytest.approx(100.0, rel=1e-4)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
    @pytest.mark.parametrize("sign", [1.0, -1.0])
    def test_extreme_logits(self, sign: float, gamma: float, dtype: torch.dtype) -> None:
        logits = torch.zeros(2, 3, dtype=dtype)
        logits[:, 1] = sign * 1e4
        logits.requires_grad_()
        loss = FocalLoss(None, gamma, reduction="none")(logits, torch.tensor([1, 0]))
        loss.sum().backward()
        # Class 1 has p = 1 or 0; with p = 0, -log p is 1e4 (plus log 2 or so). bfloat16 holds 9984.
        top = float(torch.tensor(1e4, dtype=dtype))
        wanted = [0.0, top] if sign > 0 else [top, math.log(2) * 0.5**gamma]
        assert loss.tolist() == pytest.approx(wanted, rel=1e-3)
        assert logits.grad is not None
        assert logits.grad.isfinite().all()

    def test_right_where_p_is_close_to_1(self) -> None:
        # p = 1 / (1 + e^-50): (1 - p)² · -log p = e^-150, which 1 - p in floats would make 0.
        loss = FocalLoss(None, 2.0)(torch.tensor([[50.0, 0.0]], dtype=torch.float64), torch.tensor([0]))
        assert loss.item() == pytest.approx(math.exp(-150), rel=1e-9)

    def test_wrong_alpha_length_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"alpha: wanted 5 values, one per class.*got 2 for logits \[4, 5\]"):
            FocalLoss([0.25, 0.75])(self.logits, self.targets)

    def test_ignored_targets(self) -> None:
        targets = torch.tensor([0, -100, 2, -100])
        logits = self.logits.clone().requires_grad_()
        loss = FocalLoss(0.25)(logits, targets)
        loss.backward()
        expected = sum(focal_by_hand(self.logits[i].tolist(), int(targets[i]), 0.25, 2.0) for i in (0, 2)) / 2
        assert loss.item() == pytest.approx(expected)
        assert logits.grad is not None
        assert (logits.grad[[1, 3]] == 0).all()
        none = FocalLoss(0.25, reduction="none")(self.logits, targets)
        assert none[[1, 3]].tolist() == [0.0, 0.0]

    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    @pytest.mark.parametrize("worst", [0.0, math.inf])
    def test_everything_ignored_is_zero_with_zero_gradient(self, reduction: str, worst: float) -> None:
        logits = torch.full((4, 5), worst, requires_grad=True)
        loss = FocalLoss(reduction=reduction)(logits, torch.full((4,), -100))  # type: ignore[arg-type]
        loss.backward()
        assert loss.item() == 0.0
        assert logits.grad is not None
        assert (logits.grad == 0).all()

    def test_other_and_no_ignore_index(self) -> None:
        assert FocalLoss(None, 0.0, ignore_index=2)(self.logits, self.targets).item() == pytest.approx(
            F.cross_entropy(self.logits, self.targets, ignore_index=2).item()
        )
        with pytest.raises(ValueError, match=r"0\.\.4, got -100"):
            FocalLoss(ignore_index=None)(self.logits, torch.full((4,), -100))

    def test_unsigned_targets_are_classes_not_the_ignored_index(self) -> None:
        # -100 as uint8 is 156.
        logits = torch.randn(1, 200)
        loss = FocalLoss(None, 0.0)(logits, torch.tensor([156], dtype=torch.uint8))
        torch.testing.assert_close(loss, F.cross_entropy(logits, torch.tensor([156])))

    @pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
    def test_gradient_is_that_of_finite_differences(self, gamma: float) -> None:
        loss = FocalLoss([0.1, 0.2, 0.3, 0.4, 2.0], gamma)
        logits = self.logits.clone().requires_grad_()
        assert torch.autograd.gradcheck(lambda x: loss(x, self.targets), (logits,))


class TestFocalBinary:
    probabilities = (0.9, 0.2, 0.6, 0.3)
    truth = (1, 0, 0, 1)

    @pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
    @pytest.mark.parametrize("alpha", [None, 0.25, [0.5, 3.0]])
    @pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
    def test_formula(self, gamma: float, alpha: float | list[float] | None, dtype: torch.dtype) -> None:
        negative, positive = (1.0, 1.0) if alpha is None else (0.75, 0.25) if alpha == 0.25 else (0.5, 3.0)
        expected = [
            -positive * (1 - p) ** gamma * math.log(p) if t else -negative * p**gamma * math.log(1 - p)
            for p, t in zip(self.probabilities, self.truth, strict=True)
        ]
        logits, targets = logit(*self.probabilities), torch.tensor(self.truth).to(dtype)
        assert FocalLoss(alpha, gamma, "none")(logits, targets).tolist() == pytest.approx(expected, rel=1e-6)
        with_channel = FocalLoss(alpha, gamma, "none")(logits.unsqueeze(1), targets)
        assert with_channel.tolist() == pytest.approx(expected, rel=1e-6)

    def test_gamma_0_without_alpha_is_binary_cross_entropy_with_soft_targets_too(self) -> None:
        torch.manual_seed(3)
        logits, targets = torch.randn(5, 3), torch.rand(5, 3)
        torch.testing.assert_close(
            FocalLoss(None, 0.0)(logits, targets), F.binary_cross_entropy_with_logits(logits, targets)
        )

    def test_agrees_with_the_two_class_form(self) -> None:
        logits, targets = torch.randn(8, dtype=torch.float64), torch.randint(0, 2, (8,))
        two = torch.stack((torch.zeros_like(logits), logits), 1)
        weights = [0.3, 0.7]
        torch.testing.assert_close(FocalLoss(weights)(logits, targets), FocalLoss(weights)(two, targets))

    @pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
    def test_extreme_logits(self, gamma: float) -> None:
        logits = torch.tensor([1e4, -1e4, 1e4, -1e4], requires_grad=True)
        loss = FocalLoss(None, gamma, "none")(logits, torch.tensor([1, 1, 0, 0]))
        loss.sum().backward()
        assert loss.tolist() == pytest.approx([0.0, 1e4, 1e4, 0.0])
        assert logits.grad is not None
        assert logits.grad.isfinite().all()

    def test_ignored_targets(self) -> None:
        logits = torch.tensor([0.3, math.inf, -0.2], requires_grad=True)
        loss = FocalLoss(None, 0.0)(logits, torch.tensor([1.0, -100.0, 0.0]))
        loss.backward()
        expected = F.binary_cross_entropy_with_logits(logits[[0, 2]], torch.tensor([1.0, 0.0]))
        assert loss.item() == pytest.approx(expected.item())
        assert logits.grad is not None
        assert logits.grad[1] == 0

    def test_wrong_alpha_length_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"wanted 2 values.*\[negative, positive\].*got 3"):
            FocalLoss([0.1, 0.2, 0.3])(torch.zeros(4), torch.zeros(4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gamma": -1.0}, "gamma: wanted a finite number >= 0, got -1"),
        ({"gamma": math.nan}, "gamma: wanted"),
        ({"alpha": 1.5}, "alpha: wanted a number in 0..1 or one weight per class, got 1.5"),
        ({"alpha": [0.5, -0.1]}, "alpha: wanted a number or a flat list of finite numbers >= 0"),
        ({"alpha": []}, "alpha: wanted a number or a flat list"),
        ({"alpha": [[0.5], [0.5]]}, "alpha: wanted a number or a flat list"),
        ({"reduction": "avg"}, "reduction: wanted one of mean, sum, none, got 'avg'"),
    ],
)
def test_focal_arguments_are_validated(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FocalLoss(**arguments)  # type: ignore[arg-type]


def test_alpha_is_a_buffer_that_moves_and_is_copied() -> None:
    given = torch.tensor([0.5, 0.5])
    loss = FocalLoss(given)
    given.fill_(9.0)
    assert loss.to(torch.float64).alpha is not None
    assert [(name, buffer.dtype, buffer.tolist()) for name, buffer in loss.named_buffers()] == [
        ("alpha", torch.float64, [0.5, 0.5])
    ]


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
