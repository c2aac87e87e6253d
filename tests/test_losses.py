"""dice_loss against hand-computed values and plain Python; what it and FocalLoss refuse."""

import math

import pytest
import torch
from torch import Tensor

from layercast.models.losses import FocalLoss, dice_loss


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
