"""Random projection as a reducer: distances stay, seeds repeat, sizes are known and bounded before anything is made."""

import numpy as np
import pytest
import torch
from torch import nn

from layercast.models.hooks import FeatureExtractor
from layercast.models.reducers import ReducerError, reduce, reduced_shape, split_tap

ROWS = torch.randn(20, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def by_hand(width: int, size: int, seed: int) -> torch.Tensor:
    """Achlioptas' matrix, entry by entry from the raw stream."""
    raw = [int(value) % 6 for value in np.random.PCG64(seed).random_raw(width * size)]
    entries = [{0: 1.0, 1: -1.0}.get(value, 0.0) * (3 / size) ** 0.5 for value in raw]
    return torch.tensor(entries).reshape(width, size)


@pytest.mark.parametrize(("reducer", "size", "seed"), [("proj4", 4, 0), ("proj5:7", 5, 7)])
def test_the_matrix_is_the_documented_one(reducer, size, seed):
    wanted = ROWS.flatten(1) @ by_hand(768, size, seed)
    torch.testing.assert_close(reduce(ROWS, reducer), wanted)


def test_the_stream_is_the_same_on_every_machine():
    # Written down from one machine: a change of numpy or of this code must not change what is stored in catalogues.
    eye = reduce(torch.eye(4), "proj6:7").mul(2**0.5).round().int()
    assert eye.tolist() == [[0, 0, 0, 1, -1, 1], [0, -1, 1, -1, 0, 0], [1, 1, 1, 0, -1, -1], [0, 0, -1, 0, 0, 0]]


def test_distances_stay_about_the_same():
    projected = reduce(ROWS, "proj512:1")
    ratio = torch.pdist(projected) / torch.pdist(ROWS.flatten(1))
    assert ratio.min() > 0.85
    assert ratio.max() < 1.15
    assert abs(ratio.mean() - 1) < 0.02


def test_a_seed_repeats_and_another_differs():
    assert torch.equal(reduce(ROWS, "proj32:3"), reduce(ROWS, "proj32:3"))
    assert not torch.allclose(reduce(ROWS, "proj32:3"), reduce(ROWS, "proj32"))
    assert torch.equal(reduce(ROWS, "proj32:0"), reduce(ROWS, "proj32"))


def test_after_other_reducers_and_in_a_forward():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True))
    with torch.inference_mode(), FeatureExtractor(model, ["0@mean@proj4:9@norm"]) as extractor:
        (got,) = extractor.run(ROWS).features.values()
    wanted = model[0](ROWS).mean(dim=(2, 3)) @ by_hand(8, 4, 9)
    torch.testing.assert_close(got, nn.functional.normalize(wanted).detach())


def test_tokens_that_do_not_count_are_zeros():
    tokens = torch.randn(2, 5, 3)
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    got = reduce(tokens, "proj8", mask)
    torch.testing.assert_close(got[1:], reduce(tokens[1:, :2], "proj8"))
    torch.testing.assert_close(got[:1], reduce(tokens[:1], "proj8"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int64, torch.bool])
def test_every_dtype(dtype):
    value = (ROWS[:4, 0] > 0).to(dtype)
    got = reduce(value, "proj16")
    assert got.dtype == (dtype if dtype.is_floating_point else torch.float32)
    torch.testing.assert_close(
        got.double(), value.double().flatten(1) @ by_hand(256, 16, 0).double(), atol=0.02, rtol=0
    )


@pytest.mark.parametrize(
    ("shape", "reducers"),
    [((4, 3, 16, 16), "proj64"), ((4, 5, 6), "proj7:3"), ((4, 9), "proj2@fp16"), ((4,), "proj3"), ((0, 3), "proj3")],
)
def test_shapes_are_known_beforehand(shape, reducers):
    assert reduced_shape(shape, reducers) == tuple(reduce(torch.zeros(shape), reducers).shape)


def test_a_matrix_that_would_be_too_large_is_refused():
    shape = (1, 512, 128, 128)
    with pytest.raises(ReducerError, match=r"takes at most 65,536 values a row, .* has 8,388,608; reduce it first"):
        reduced_shape(shape, "proj64")
    with pytest.raises(ReducerError, match="at most 65,536"):
        reduce(torch.zeros(1).expand(shape), "proj64")
    assert reduced_shape(shape, "mean@proj64") == (1, 64)
    assert reduced_shape((1, 65536), "proj64") == (1, 64)


@pytest.mark.parametrize(
    "reducer", ["proj", "proj0", "projD", "proj5000", "proj64:", "proj64:-1", "proj64:1e3", "projx"]
)
def test_what_is_no_projection_is_refused(reducer):
    with pytest.raises(ReducerError, match=r"unknown reducer .* projD \(as proj64 or proj64:SEED\)"):
        split_tap(f"layer1@{reducer}")


def test_a_tap_keeps_its_seed():
    assert split_tap("type:Conv2d@proj64:7@norm") == ("type:Conv2d", "proj64:7@norm")
