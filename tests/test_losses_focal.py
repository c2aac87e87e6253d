"""FocalLoss against the formula in plain Python, the paper's example and torch's cross entropies."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from layercast.models.losses import FocalLoss


def logit(*probabilities: float) -> Tensor:
    return torch.logit(torch.tensor(probabilities, dtype=torch.float64))


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

    def test_gamma_0_with_a_class_ruled_out_is_still_cross_entropy(self) -> None:
        logits = torch.tensor([[0.5, -math.inf], [-math.inf, 0.5]])
        assert FocalLoss(None, 0.0, "none")(logits, torch.tensor([0, 1])).tolist() == [0.0, 0.0]

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
