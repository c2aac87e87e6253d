"""What a request's inputs and outputs are held against, and what a wrong one is told."""

import numpy as np
import pytest

from layercast.models.manifest import FileEntry, LayerSpec, Manifest, TensorSpec
from layercast.server.errors import InvalidArgument, ResourceExhausted
from layercast.server.layers import answer_bytes, check_size, resolve
from layercast.server.service.requests import check_inputs, resolve_outputs, token_length
from layercast.server.settings import ModelSettings
from layercast.server.work import Tap

ENTRY = FileEntry(sha256="0" * 64, bytes=1)
MANIFEST = Manifest(
    name="m",
    version=1,
    architecture="A",
    inputs=(
        TensorSpec(name="image", datatype="FP32", shape=(-1, 3, 4)),
        TensorSpec(name="tokens", datatype="INT64", shape=(-1, -1), range=(0, 256), pad=256, max_length=8),
    ),
    outputs=(
        TensorSpec(name="logits", datatype="FP32", shape=(-1, 2)),
        TensorSpec(name="aux", datatype="FP32", shape=(-1, 1)),
    ),
    layers=(
        LayerSpec(path="stem", type="Conv2d", shape=(-1, 8, 4, 4), datatype="FP32", order=0),
        LayerSpec(path="blocks.0", type="Block", shape=(-1, -1, 16), datatype="FP32", order=1),
        LayerSpec(path="blocks.1", type="Block", shape=(-1, -1, 16), datatype="FP32", order=2),
        LayerSpec(path="hidden", type="Linear", available=False, reason="it never runs in eval mode"),
    ),
    files={"weights.safetensors": ENTRY, "golden.safetensors": ENTRY},
)


def inputs(image=(2, 3, 4), tokens=(2, 5), token=0):
    arrays = {"image": np.zeros(image, "f4"), "tokens": np.full(tokens, token, "i8")}
    return arrays, {"image": "FP32", "tokens": "INT64"}


def test_right_inputs_give_the_number_of_rows():
    assert check_inputs(MANIFEST, *inputs()) == 2
    assert check_inputs(MANIFEST, *inputs((0, 3, 4), (0, 5))) == 0
    assert check_inputs(MANIFEST, *inputs((1, 3, 4), (1, 8))) == 1


@pytest.mark.parametrize(
    ("arrays", "message", "field"),
    [
        (
            inputs((3, 4), (2, 5)),
            r"want shape \[-1, 3, 4\], got \[3, 4\]; the first dimension is the batch: add it",
            "inputs[0].shape",
        ),
        (
            inputs((2, 3, 5), (2, 5)),
            r"want shape \[-1, 3, 4\], got \[2, 3, 5\]; dimension 2 differs",
            "inputs[0].shape",
        ),
        (inputs((2, 12), (2, 5)), "so 3 dimensions in all", "inputs[0].shape"),
        (inputs((2, 3, 4), (2, 9)), "9 long, the model takes at most 8", "inputs[1].shape"),
        (inputs((2, 3, 4), (2, 0)), r"want shape \[-1, -1\], got \[2, 0\]", "inputs[1].shape"),
        (inputs((2, 3, 4), (1, 5)), "same number of rows.*'image' has 2, 'tokens' has 1", "inputs"),
        (inputs(token=257), "want values from 0 to 256, got 257 to 257", "inputs[1]"),
        (inputs(token=-1), "want values from 0 to 256, got -1 to -1", "inputs[1]"),
    ],
)
def test_wrong_values_and_shapes_say_what_was_wanted_and_what_came(arrays, message, field):
    values, datatypes = arrays
    with pytest.raises(InvalidArgument, match=message) as raised:
        check_inputs(MANIFEST, values, datatypes)
    assert raised.value.field == field


def test_missing_and_unknown_inputs_are_named():
    arrays, datatypes = inputs()
    with pytest.raises(InvalidArgument, match="input 'tokens' is missing"):
        check_inputs(MANIFEST, {"image": arrays["image"]}, datatypes)
    with pytest.raises(InvalidArgument, match="no input 'imag'; nearest: image"):
        check_inputs(MANIFEST, {**arrays, "imag": arrays["image"]}, {**datatypes, "imag": "FP32"})


def test_a_wrong_datatype_names_both():
    arrays, datatypes = inputs()
    with pytest.raises(InvalidArgument, match="want datatype FP32, got 'FP64'"):
        check_inputs(MANIFEST, arrays, {**datatypes, "image": "FP64"})


def test_no_requested_output_means_all_and_an_order_is_kept():
    assert resolve_outputs(MANIFEST, [], ModelSettings()).order == ("logits", "aux")
    wanted = resolve_outputs(MANIFEST, ["aux", "layer:stem@mean", "logits"], ModelSettings())
    assert wanted.order == ("aux", "layer:stem@mean", "logits")
    assert wanted.outputs == ("aux", "logits")
    assert [asked.tap for asked in wanted.layers] == [Tap("stem", "mean")]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["logit"], "unexpected inference output 'logit'.*nearest: logits"),
        (["layer:blocks.9"], "no layer 'blocks.9'; nearest: blocks"),
        (["layer:stem@avg"], "unknown reducer 'avg'"),
        (["layer:stem@cls"], r"reducer cls wants a layer of shape \[N, T, D\]"),
        (["layer:hidden"], "'hidden' can't be tapped: it never runs in eval mode"),
        (["logits", "logits"], "output 'logits' is asked for twice"),
        (["layer:stem", "layer:stem"], "output 'layer:stem' is asked for twice"),
        (["layer:"], "must not be empty"),
        (["layer:type:Conv1d"], "no layer 'type:Conv1d'; nearest: type:Conv2d"),
        (["layer:stem@proj64:x"], "unknown reducer 'proj64:x'"),
    ],
)
def test_wrong_outputs_get_a_clear_error(names, message):
    with pytest.raises(InvalidArgument, match=message):
        resolve_outputs(MANIFEST, names, ModelSettings())


def test_a_glob_selects_what_can_be_tapped_in_order():
    assert [asked.name for asked in resolve(MANIFEST, ["*"], "layers[{}]", ModelSettings())] == [
        "stem",
        "blocks.0",
        "blocks.1",
    ]
    assert [asked.name for asked in resolve(MANIFEST, ["blocks.*@mean", "stem"], "layers[{}]", ModelSettings())] == [
        "blocks.0@mean",
        "blocks.1@mean",
        "stem",
    ]
    assert [asked.name for asked in resolve(MANIFEST, ["type:B*@proj8:3"], "layers[{}]", ModelSettings())] == [
        "blocks.0@proj8:3",
        "blocks.1@proj8:3",
    ]


def test_sizes_are_known_before_anything_runs():
    assert answer_bytes(MANIFEST, [Tap("stem")], 3, None) == 3 * 8 * 4 * 4 * 4
    assert answer_bytes(MANIFEST, [Tap("stem", "mean")], 3, None) == 3 * 8 * 4
    assert answer_bytes(MANIFEST, [Tap("blocks.0"), Tap("blocks.1", "mean@fp16")], 3, 5) == 3 * 5 * 16 * 4 + 3 * 16 * 2
    assert answer_bytes(MANIFEST, [Tap("stem", "proj6:1")], 3, None) == 3 * 6 * 4
    check_size(MANIFEST, [Tap("stem")], 3, None, limit=1536 + 65536)
    with pytest.raises(ResourceExhausted, match="67,072 bytes for 3 rows, an answer holds 67,071"):
        check_size(MANIFEST, [Tap("stem")], 3, None, limit=67071)
    with pytest.raises(ResourceExhausted, match="67,096 bytes"):
        check_size(MANIFEST, [Tap("stem")], 3, None, limit=67_072, outputs=["logits"])


def test_a_length_that_a_projection_cannot_take_is_refused():
    assert answer_bytes(MANIFEST, [Tap("blocks.0", "proj4096")], 1, 64) == 4096 * 4
    with pytest.raises(InvalidArgument, match=r"layer 'blocks.0': reducer proj4096 takes at most 1,024 values a row"):
        answer_bytes(MANIFEST, [Tap("blocks.0", "proj4096")], 1, 65)


def test_patterns_are_bounded_and_many_stars_cost_nothing():
    for names in (["layer:stem"] * 257, ["layer:" + "*" * 300]):
        with pytest.raises(InvalidArgument, match="at most 256"):
            resolve_outputs(MANIFEST, names, ModelSettings())
    with pytest.raises(InvalidArgument, match="no layer"):
        resolve_outputs(MANIFEST, ["layer:" + "*b" * 60 + "x"], ModelSettings())


def test_the_token_dimension_is_found():
    assert token_length(MANIFEST, inputs()[0]) == 5
