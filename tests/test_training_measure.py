"""Test figures against a case worked out by hand."""

import pytest
import torch

from layercast.models.training.measure import confusion_matrix, figures, logits_of


def test_figures_of_a_small_matrix():
    targets = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2])
    predicted = torch.tensor([0, 0, 0, 1, 1, 1, 0, 1])
    matrix = confusion_matrix(predicted, targets, 3)
    assert matrix.tolist() == [[3, 1, 0], [1, 2, 0], [0, 1, 0]]
    found = figures(matrix, ("a", "b", "c"))
    assert found["accuracy"] == pytest.approx(5 / 8)
    assert found["confusion"] == matrix.tolist()
    assert found["classes"]["a"] == {"precision": 0.75, "recall": 0.75, "f1": 0.75}
    # b: 2 of 4 predicted and 2 of 3 true; F1 = 2 · (1/2 · 2/3) / (1/2 + 2/3) = 4/7
    assert found["classes"]["b"] == {"precision": 0.5, "recall": 0.6667, "f1": pytest.approx(4 / 7, abs=1e-4)}
    # c is never predicted: no NaN
    assert found["classes"]["c"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0}


@pytest.mark.parametrize("rows", [1, 4, 5, 8])
def test_logits_are_those_of_every_row_in_order(rows: int):
    inputs = torch.arange(rows)
    sizes = []

    def forward(batch: torch.Tensor) -> torch.Tensor:
        sizes.append(len(batch))
        return torch.stack([batch.float(), -batch.float()], dim=1)

    assert logits_of(forward, inputs, batch_size=4)[:, 0].tolist() == list(range(rows))
    assert max(sizes) <= 4
