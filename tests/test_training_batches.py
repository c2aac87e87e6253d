"""Batches: every row once, seeded, lengths together."""

import pytest
import torch

from layercast.models.training.batches import batches, batches_of_similar_length


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(
    ("count", "size", "sizes"), [(12, 4, [4, 4, 4]), (14, 4, [4, 4, 4]), (3, 4, [3]), (4, 4, [4]), (1, 4, [1])]
)
def test_whole_batches_of_different_rows(grouped: bool, count: int, size: int, sizes: list[int]):
    def plan(seed: int) -> list[torch.Tensor]:
        lengths = torch.arange(count) % 5
        return batches_of_similar_length(lengths, size, seeded(seed)) if grouped else batches(count, size, seeded(seed))

    found = plan(0)
    assert [len(batch) for batch in found] == sizes
    rows = torch.cat(found).tolist()
    assert len(set(rows)) == len(rows)
    assert set(rows) <= set(range(count))
    assert [batch.tolist() for batch in found] == [batch.tolist() for batch in plan(0)]


def test_rows_of_similar_length_share_a_batch():
    lengths = torch.randint(1, 193, (4000,), generator=seeded())
    longest = lambda plan: sum(int(lengths[batch].max()) * len(batch) for batch in plan)  # noqa: E731
    grouped, plain = batches_of_similar_length(lengths, 64, seeded()), batches(4000, 64, seeded())
    assert longest(grouped) < 0.6 * longest(plain)
    means = [float(lengths[batch].float().mean()) for batch in grouped]
    assert means != sorted(means), "the batches come in random order"
