"""The kernel of the engine winograd: convolutions of many sizes against torch's in float64."""

import threading
from pathlib import Path

import compiled_kernels
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from layercast.server import compiled, kernels
from layercast.server.engines.base import EngineError
from layercast.server.engines.winograd.body import Body, Convolution
from layercast.server.engines.winograd.library import Library
from layercast.server.engines.winograd.plan import Plan, Shape

SIZES = [(1, 1), (3, 2), (4, 4), (5, 7), (8, 8), (14, 13), (31, 33)]


@pytest.fixture(scope="module", params=list(kernels.LEVELS))
def library(request, kernels_folder) -> Library:
    """Each library that this processor can run."""
    return Library(compiled_kernels.library_of("winograd", request.param, kernels_folder))


def convolution(source: str, target: str, into: int, out: int, kernel: int = 3, stride: int = 1, **also) -> Convolution:
    rng = np.random.default_rng(len(target) + into + out + kernel + stride)
    weights = rng.standard_normal((out, into, kernel, kernel)).astype("f4") * np.float32((2 / into) ** 0.5 / kernel)
    return Convolution(source, target, weights, rng.standard_normal(out).astype("f4"), stride, **also)


RESIDUAL = Body("x", "d", (
    convolution("x", "a", 3, 64, relu=True),
    convolution("a", "b", 64, 64, relu=True),
    convolution("b", "c", 64, 64, shortcut="a", relu=True),
    convolution("c", "d", 64, 64, shortcut="c"),
))  # fmt: skip
STRIDED = Body("x", "e", (
    convolution("x", "a", 64, 128, stride=2, relu=True),
    convolution("x", "s", 64, 128, kernel=1, stride=2),
    convolution("a", "b", 128, 128, shortcut="s", relu=True),
    convolution("b", "c", 128, 64, kernel=1),
    convolution("c", "d", 64, 64),
    convolution("d", "e", 64, 128, kernel=1, shortcut="b", relu=True),
))  # fmt: skip


def wanted(body: Body, images: np.ndarray) -> np.ndarray:
    values = {body.start: torch.from_numpy(images).double()}
    for step in body.steps:
        weights, bias = (torch.from_numpy(array).double() for array in (step.weights, step.bias))
        value = functional.conv2d(values[step.source], weights, bias, step.stride, step.kernel // 2)
        value = value + values[step.shortcut] if step.shortcut else value
        values[step.target] = value.relu() if step.relu else value
    return values[body.end].numpy()


def images_of(body: Body, rows: int, height: int, width: int) -> np.ndarray:
    channels = body.steps[0].weights.shape[1]
    return np.random.default_rng(rows).standard_normal((rows, channels, height, width)).astype("f4")


def check(got: np.ndarray, want: np.ndarray) -> None:
    assert got.shape == want.shape
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, rtol=0, atol=3e-5 * max(1.0, np.abs(want).max()))


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("body", [RESIDUAL, STRIDED], ids=["residual", "strided"])
def test_maps_of_any_size(library, body, height, width):
    images = images_of(body, 3, height, width)
    plan = Plan(library, body, Shape(*images.shape[1:]))
    check(plan.run(images, plan.workspace(library.kernel.crew(1))), wanted(body, images))


def test_a_workspace_serves_one_batch_after_the_other(library):
    """What an earlier batch left around the images, or in images that are no longer there, changes nothing."""
    plan = Plan(library, RESIDUAL, Shape(3, 6, 9))
    workspace = plan.workspace(library.kernel.crew(1))
    for rows in (9, 1, 4, 5, 2, 13):
        images = images_of(RESIDUAL, rows, 6, 9)
        got = plan.run(images, workspace)
        check(got, wanted(RESIDUAL, images))
        for row in range(rows):
            np.testing.assert_array_equal(
                plan.run(images[row : row + 1], plan.workspace(library.kernel.crew(1)))[0], got[row]
            )


def test_large_maps_go_through_in_smaller_groups(library):
    wide = Plan(library, RESIDUAL, Shape(3, 8, 8))
    large = Plan(library, RESIDUAL, Shape(3, 150, 150))
    assert wide.group > large.group >= 1
    images = images_of(RESIDUAL, 3, 150, 150)
    check(large.run(images, large.workspace(library.kernel.crew(1))), wanted(RESIDUAL, images))


def test_what_is_not_a_number_stays_so_and_in_its_own_row(library):
    images = images_of(RESIDUAL, 6, 8, 8)
    clean = images.copy()
    images[2, 0, 3, 3] = np.nan
    images[4, 1, 0, 0] = np.inf
    plan = Plan(library, RESIDUAL, Shape(3, 8, 8))
    got, want = (
        plan.run(images, plan.workspace(library.kernel.crew(1))),
        plan.run(clean, plan.workspace(library.kernel.crew(1))),
    )
    assert np.isnan(got[2, :, 3, 3]).all()
    assert not np.isfinite(got[4, :, 0, 0]).any()
    for row in (0, 1, 3, 5):
        np.testing.assert_array_equal(got[row], want[row])


def test_threads_share_a_plan(library):
    plan = Plan(library, STRIDED, Shape(64, 9, 10))
    batches = [images_of(STRIDED, rows, 9, 10) for rows in (1, 3, 5, 7)]
    got: dict[int, np.ndarray] = {}

    def run(at: int) -> None:
        workspace = plan.workspace(library.kernel.crew(1))
        for _ in range(5):
            got[at] = plan.run(batches[at], workspace)

    threads = [threading.Thread(target=run, args=(at,)) for at in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for at, images in enumerate(batches):
        check(got[at], wanted(STRIDED, images))


def test_its_error_is_near_that_of_direct_convolution(library):
    """Eight layers, as in a network: the usual points of the algorithm have four times the error."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(64, 64, 3, padding=1, bias=False) for _ in range(8)]
    for layer in layers:
        nn.init.kaiming_normal_(layer.weight)
    steps = tuple(
        Convolution(str(at), str(at + 1), layer.weight.detach().numpy(), np.zeros(64, "f4"), 1, relu=True)
        for at, layer in enumerate(layers)
    )
    body, images = Body("0", "8", steps), images_of(RESIDUAL, 4, 32, 32)
    images = np.repeat(images, 22, 1)[:, :64].copy()
    plan = Plan(library, body, Shape(64, 32, 32))
    exact = wanted(body, images)
    with torch.inference_mode():
        direct = torch.from_numpy(images)
        for layer in layers:
            direct = layer(direct).relu()
    error = np.abs(plan.run(images, plan.workspace(library.kernel.crew(1))) - exact).mean()
    assert error < 8 * np.abs(direct.numpy() - exact).mean()


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ((convolution("x", "a", 8, 64),), "8 channels follows one of 3"),
        ((convolution("x", "a", 3, 24),), "24 channels, which is no multiple of"),
        ((convolution("x", "a", 3, 64), convolution("a", "b", 64, 64, stride=2, shortcut="a")), "different shapes"),
    ],
)
def test_what_it_can_not_compute_is_refused(library, steps, message):
    with pytest.raises(EngineError, match=message):
        Plan(library, Body("x", steps[-1].target, steps), Shape(3, 8, 8))


def test_the_library_is_the_one_for_this_processor(kernels_folder: Path, monkeypatch):
    monkeypatch.setattr(compiled, "_looked_in", [])
    compiled.look_in(kernels_folder)
    path = compiled.kernel("winograd")
    assert path is not None
    assert Library(path).panel == (64 if kernels.LEVELS["v4"] <= kernels.instructions() else 16)
