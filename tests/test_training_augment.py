"""Augmentation: what may change does, what must not does not."""

import pytest
import torch
from torch import Tensor

from layercast.models.training import augment

PADDING = augment.PADDING


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def centre(images: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column of every image's centre of mass."""
    mass = images.sum(dim=(1, 2, 3))
    ticks = torch.arange(images.shape[-1]).float()
    return (images.sum(dim=(1, 3)) @ ticks) / mass, (images.sum(dim=(1, 2)) @ ticks) / mass


def test_digits_move_and_bend_a_little_and_keep_their_brightness():
    images = torch.zeros(200, 1, 28, 28)
    images[:, :, 9:19, 11:17] = 1.0
    changed = augment.digits(images, seeded())
    assert changed.shape == images.shape
    assert changed.min() >= 0
    assert changed.max() <= 1 + 1e-6
    row, column = centre(changed)
    assert (row - 13.5).abs().max() < 5
    assert (column - 13.5).abs().max() < 5
    assert row.std() > 0.5
    assert column.std() > 0.5
    share = changed.sum(dim=(1, 2, 3)) / 60
    assert share.min() > 0.5
    assert share.max() < 1.8
    assert (changed - images).abs().mean(dim=(1, 2, 3)).min() > 0


@pytest.mark.parametrize("name", ["digits", "photos"])
def test_image_augmentation_is_seeded(name: str):
    images = torch.rand(4, 1, 28, 28) if name == "digits" else torch.rand(4, 3, 32, 32)
    function = getattr(augment, name)
    assert torch.equal(function(images, seeded(1)), function(images, seeded(1)))
    assert not torch.equal(function(images, seeded(1)), function(images, seeded(2)))


@pytest.mark.parametrize("size", [24, 32])
def test_photos_are_windows_of_the_padded_image_mirrored_or_not_with_one_hole(size: int):
    images = torch.rand(64, 3, 32, 32, generator=seeded(3)) + 0.1
    changed = augment.photos(images, seeded(4), size, hole=8)
    padded = torch.nn.functional.pad(images, (4, 4, 4, 4), mode="reflect")
    mirrored = 0
    for index in range(16):
        windows = padded[index].unfold(1, size, 1).unfold(2, size, 1).permute(1, 2, 0, 3, 4).reshape(-1, 3, size, size)
        hole = changed[index] == 0
        found = []
        for flipped in (False, True):
            wanted = windows.flip(-1) if flipped else windows
            found.append(bool(((changed[index] == wanted) | hole).all(dim=(1, 2, 3)).any()))
        assert any(found)
        mirrored += found[1] and not found[0]
        assert 0 < int(hole[0].sum()) <= 81
    assert 0 < mirrored < 16


def test_text_keeps_the_order_of_bytes_and_pads_at_the_end():
    tokens = torch.full((300, 40), PADDING)
    for row in range(300):
        tokens[row, : 10 + row % 30] = torch.arange(10 + row % 30) + 100
    changed = augment.text(tokens, seeded())
    assert changed.shape == tokens.shape
    assert changed.dtype == torch.int64
    lost = 0
    for before, after in zip(tokens, changed, strict=True):
        kept = after[after != PADDING].tolist()
        assert after.tolist() == kept + [PADDING] * (40 - len(kept))
        lowered = [token + 32 if token < 100 else token for token in kept]
        assert lowered == sorted(set(lowered)), "bytes rise in the original, so they must still"
        assert kept, "something is left"
        lost += int((before != PADDING).sum()) - len(kept)
    assert 0.02 < lost / int((tokens != PADDING).sum()) < 0.3


def test_text_changes_the_case_of_whole_texts_only():
    tokens = torch.tensor([list(b"Hello there 7")] * 200)
    changed = augment.text(tokens, seeded(), drop=0.0)
    seen = {bytes(token for token in row if token != PADDING) for row in changed.tolist()}
    assert all(text in b"Hello there 7" or text in b"HELLO THERE 7" for text in seen)
    assert any(text.isupper() for text in seen)
    assert b"Hello there 7" in seen
    assert torch.equal(augment.text(tokens, seeded(), 0.0), changed)


def test_a_row_of_padding_stays_one():
    tokens = torch.full((8, 5), PADDING)
    assert torch.equal(augment.text(tokens, seeded()), tokens)
