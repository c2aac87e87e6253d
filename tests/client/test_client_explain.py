"""Explanations through both clients and the command line."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from serving import Running
from torch import nn

from layercast.client import AsyncClient, Client, Explanation, InvalidArgument, NotFound
from layercast.client.commands.common import SAMPLES
from layercast.models.explain import explain
from layercast.proto.messages import ExplainRequest

image_module = pytest.importorskip("PIL.Image", reason="Pillow comes with the images extra")

Run = Callable[..., tuple[int, str, str]]
IMAGES = np.zeros((2, 1, 28, 28), "f4")


@pytest.fixture
def client(server: Any) -> Any:
    with Client(server.url) as made:
        yield made


def digit(number: int) -> str:
    return str(SAMPLES / f"digit-{number}.png")


@pytest.mark.parametrize(
    ("model", "method", "options"),
    [("resnet", "integrated-gradients", {"steps": 8, "baseline": 0.25}), ("transformer", "attention-rollout", {})],
)
def test_a_real_server_gives_what_the_library_gives(
    served: Running, modules: dict[str, nn.Module], model: str, method: str, options: dict[str, Any]
) -> None:
    generator = np.random.default_rng(3)
    pictures = generator.random((2, 3, 32, 32))  # float64: fitted to the model's FP32
    rows = pictures if model == "resnet" else generator.integers(1, 200, (2, 9))
    with Client(served.url, timeout=60) as client:
        got = client.explain(model, rows, method, targets=[1, 0], **options)
    tensor = torch.from_numpy(rows.astype("f4") if model == "resnet" else rows)
    wanted = explain(modules[model], tensor, method, targets=[1, 0], **options)
    np.testing.assert_allclose(got.attributions, wanted.attributions, atol=1e-5, rtol=1e-3)
    assert got.targets.tolist() == [1, 0]
    assert (got.version, got.attributions.dtype) == ("1", np.float32)
    if method == "integrated-gradients":
        assert got.delta is not None
        np.testing.assert_allclose(got.delta, wanted.delta, atol=1e-5)


async def test_both_clients_send_and_return_the_same(server: Any, client: Client) -> None:
    arguments: dict[str, Any] = {"output": "logits", "input": "image", "version": "2", "id": "why"}
    options: dict[str, Any] = {
        "layer": "net.0", "steps": 8, "baseline": 0.25, "samples": 3, "noise": 0.5, "seed": 7, "window": 4,
        "stride": (2, 3), "upsample": False, "pool": "cls", "residual": 0.25,
    }  # fmt: skip
    one = client.explain("mnist", IMAGES, "occlusion", np.array([3, 4]), **arguments, **options)
    async with AsyncClient(server.url) as other:
        two = await other.explain("mnist", IMAGES, "occlusion", [3, 4], **arguments, **options)
    first, second = server.asked(ExplainRequest)
    assert first == second
    assert (first.method, list(first.targets), first.output, first.input) == ("occlusion", [3, 4], "logits", "image")
    assert (first.model_version, first.id) == ("2", "why")
    sent = {field.name: value for field, value in first.options.ListFields()}
    assert {**sent, "window": list(sent["window"]), "stride": list(sent["stride"])} == {
        **options,
        "window": [4],
        "stride": [2, 3],
    }
    for got in (one, two):
        assert isinstance(got, Explanation)
        assert got.attributions.shape == IMAGES.shape
        assert got.attributions.sum() == -32
        assert (got.targets.tolist(), got.delta, got.warning) == ([3, 4], None, "")
        assert (got.timing.queue, got.timing.compute, got.timing.batch_rows) == (0.001, 2.0, 2)


def test_what_is_left_out_is_not_sent(server: Any, client: Client) -> None:
    got = client.explain("mnist", IMAGES, layer=None)  # type: ignore[typeddict-item]
    (request,) = server.asked(ExplainRequest)
    assert (request.method, list(request.targets), request.options.ListFields()) == ("integrated-gradients", [], [])
    assert got.delta is not None
    assert got.delta.tolist() == [0.5, 0.5]
    assert client.explain("mnist", IMAGES, "saliency", 0).warning == "values beyond 0 to 1"
    assert list(server.asked(ExplainRequest)[1].targets) == [0]


def test_wrong_arguments_are_told_before_anything_is_sent(server: Any, client: Client) -> None:
    with pytest.raises(TypeError, match=r"no argument 'stepps'; did you mean 'steps'\?"):
        client.explain("mnist", IMAGES, stepps=3)  # type: ignore[call-arg]
    for options in ({"steps": "many"}, {"window": [1.5]}, {"seed": 2**70}):
        (name,) = options
        with pytest.raises(InvalidArgument, match=f"option '{name}' can't be"):
            client.explain("mnist", IMAGES, **options)  # type: ignore[arg-type]
    for targets in (1.5, [[1]], "cat"):
        with pytest.raises(InvalidArgument, match="targets are class indices"):
            client.explain("mnist", IMAGES, targets=targets)  # type: ignore[arg-type]
    assert server.asked(ExplainRequest) == []
    with pytest.raises(NotFound):
        client.explain("unknown", IMAGES)


def test_the_table_and_the_files(run: Run, server: Any, tmp_path: Path) -> None:
    code, out, _ = run("explain", "mnist", digit(7), digit(2), "--target", "3", "--steps", "9")
    assert code == 0
    assert [line.split() for line in out.splitlines()] == [
        ["input", "explained", "lowest", "highest", "sum", "delta"],
        ["digit-7.png", "3", "0", "1", "16", "0.5"],
        ["digit-2.png", "3", "0", "1", "16", "0.5"],
    ]
    (request,) = server.asked(ExplainRequest)
    assert (list(request.targets), request.options.steps, request.options.HasField("upsample")) == ([3], 9, False)
    target = tmp_path / "why.npz"
    code, out, _ = run("explain", "mnist", digit(7), "--output", str(target))
    assert (code, out) == (0, f"integrated-gradients of 1 rows, [1, 1, 28, 28], in {target}\n")
    with np.load(target) as saved:
        assert {name: saved[name].shape for name in saved} == {
            "attributions": (1, 1, 28, 28),
            "targets": (1,),
            "delta": (1,),
        }


def test_json_and_labels(run: Run, server: Any) -> None:
    code, out, _ = run("explain", "sms", "hi", "you", "--method", "saliency", "--target", "spam", "ham", "--json")
    assert code == 0
    answer = json.loads(out)
    assert (answer["model"], answer["version"], answer["method"]) == ("sms", "2", "saliency")
    assert answer["warning"] == "values beyond 0 to 1"
    assert answer["explanations"] == [
        {"input": "hi", "target": 1, "label": "spam", "attributions": [0, 0, 1]},
        {"input": "you", "target": 0, "label": "ham", "attributions": [0, 0, 1]},
    ]
    assert run("explain", "sms", "hi", "--method", "saliency")[2] == "layercast: values beyond 0 to 1\n"
    code, out, _ = run("explain", "sms", "hi", "--method", "attention-rollout")
    assert out.splitlines()[0].split() == ["input", "lowest", "highest", "sum"]
    code, _, err = run("explain", "sms", "hi", "--target", "eggs")
    assert (code, err) == (1, "layercast: model 'sms' has no label 'eggs'; it has ham, spam\n")


def pixels(path: Path) -> np.ndarray:
    with image_module.open(path) as image:
        return np.asarray(image.convert("RGB"), np.int64)


# Where a tile of a 28 x 28 picture lies: below the title at the margin, 8 pixels a value, and then the overlay.
LEFT = 12 + 224 + 6


def picture_top(image: np.ndarray) -> int:
    """The first line of the black picture, at the left margin."""
    return int(np.flatnonzero((image[:, 13] == 0).all(axis=-1))[0])


@pytest.mark.parametrize(("method", "channel"), [("integrated-gradients", None), ("gradcam", 0), ("occlusion", 2)])
def test_the_overlay_lights_the_patch_that_counts(run: Run, tmp_path: Path, method: str, channel: int | None) -> None:
    target = tmp_path / "why.png"
    code, _, _ = run("explain", "mnist", digit(7), "--method", method, "--plot", str(target))
    assert code == 0
    image = pixels(target)
    top = picture_top(image)
    inside = image[top + 4 * 8 : top + 8 * 8, LEFT + 10 * 8 : LEFT + 14 * 8]
    other = image[top + 2 * 8 : top + 3 * 8, LEFT : LEFT + 224]
    # The patch is nowhere the colour of a place outside of it; that has no colour but grey.
    assert (other.max(axis=-1) - other.min(axis=-1)).max() <= 16
    assert np.abs(inside.reshape(-1, 3) - other[0, 0]).sum(axis=-1).min() > 60
    if channel is not None:
        assert (inside[..., channel] > inside[..., 2 - channel]).all()
    border = image[top + 4 * 8 - 1, LEFT + 10 * 8 : LEFT + 14 * 8]
    assert (border.max(axis=-1) - border.min(axis=-1)).max() <= 16


def test_the_token_that_counts_is_red(run: Run, tmp_path: Path) -> None:
    target = tmp_path / "why.png"
    assert run("explain", "sms", "aaaa", "--method", "saliency", "--plot", str(target))[0] == 0
    image = pixels(target)
    red = (image[..., 0] > 150) & (image[..., 1] < 60)
    _, columns = np.nonzero(red[: image.shape[0] - 30])  # above the scale, whose end is red too
    assert columns.size > 100
    assert columns.max() - columns.min() < 20
    assert columns.min() > 35  # the last of four


def test_features_are_drawn(run: Run, tmp_path: Path) -> None:
    target = tmp_path / "maps.png"
    code, out, _ = run("features", "mnist", digit(7), "--layers", "net.0", "--plot", str(target))
    assert code == 0
    assert out.splitlines()[1].split()[0] == "net.0"
    assert pixels(target).shape[1] > 100


def test_pictures_that_cannot_be_written(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, _, err = run("explain", "mnist", digit(7), "--plot", str(tmp_path / "no" / "why.png"))
    assert code == 1
    assert "No such file or directory" in err
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"hi\n\nyou\n")))
    assert run("explain", "sms", "-", "--plot", str(tmp_path / "why.png"))[0] == 0


@pytest.mark.parametrize(
    "arguments",
    [["--steps", "0"], ["--window", "x"], ["--baseline", "black"], ["--stepps", "3"], ["--plot", "why.txt"]],
)
def test_bad_arguments_exit_with_2(run: Run, arguments: list[str]) -> None:
    code, _, err = run("explain", "mnist", digit(7), *arguments)
    assert code == 2
    assert arguments[0] in err
