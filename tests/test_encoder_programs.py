"""The engine encoder on programs made by hand: what it takes of them, and what it leaves to ONNX Runtime."""

from pathlib import Path

import numpy as np
import pytest
from encoder_programs import (
    FACTOR,
    LANES,
    MASK,
    TOKENS,
    WIDTH,
    attend,
    by_onnx_runtime,
    engine,
    node,
    program,
    taken,
    targets,
)
from onnx import TensorProto, helper
from test_encoder_engine import exported

from layercast.server.engines.base import EngineError
from layercast.server.engines.encoder.body import body_of
from layercast.server.engines.encoder.steps import Attention

pytestmark = pytest.mark.usefixtures("kernels_here")


@pytest.fixture(scope="module")
def directory() -> Path:
    """An artefact that gets other programs."""
    return exported("Plain")[1]


BESIDE = [node("ReduceMax", "x axis2", "largest"), node("Cast", "largest", "counts", to=TensorProto.INT32)]


@pytest.mark.parametrize(
    ("attributes", "scale", "hidden"),
    [
        ({}, 0.25, -1e4),
        ({"scale": 0.5, "mask_filter_value": -7.0, "unidirectional": 0, "do_rotary": 0}, 0.5, -7.0),
        ({"scale": 0.0}, 0.25, -1e4),
    ],
)
@pytest.mark.parametrize("shown", [[1, 1, 0], [0, 0, 0], [3, -1, 0]])
def test_attention_means_what_it_means_to_onnx_runtime(directory, monkeypatch, attributes, scale, hidden, shown):
    content = program(attend(mask="shows", target="y", **attributes), inputs=(MASK,))
    (step,) = body_of(content, LANES).steps
    assert isinstance(step, Attention)
    assert (step.scale, step.hidden, step.mask) == (scale, hidden, "shows")
    inputs = {
        "x": np.random.default_rng(3).standard_normal((4, 3, WIDTH), "f4"),
        "shows": np.tile(np.int32(shown), (4, 1)),
    }
    got = engine(directory, content, monkeypatch, MASK).run(inputs)["y"]
    np.testing.assert_allclose(got, by_onnx_runtime(content, inputs), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "attributes",
    [
        {"unidirectional": 1}, {"do_rotary": 1}, {"qkv_hidden_sizes": [WIDTH] * 3}, {"past_present_share_buffer": 1},
        {"rotary_embedding_dim": 32}, {"num_heads": 0}, {"num_heads": -2}, {"num_heads": 3}, {"num_heads": 4},
    ],
)  # fmt: skip
def test_other_attention_is_left_to_onnx_runtime(attributes):
    assert taken(attend(target="y", **attributes)) is None
    assert targets(taken(attend(), attend("a", "y", **attributes))) == ["a"]


@pytest.mark.parametrize(
    "other",
    [
        attend("a", "y", mask="shown"),
        attend("a", "y", "- past"),
        attend("a", "y", "- - bias"),
        attend("a", "y present"),
        attend("a", "y", weights="qkv -"),
        attend("a", "y", weights="x qkv_bias"),
        attend("a", "y", weights="qkv m_bias"),
        attend("a", "y", weights="even qkv_bias"),
        attend("a", "y", weights="square m_bias"),
        attend("a", "y", weights="narrow one"),
        attend("a", "y", weights="none m_bias"),
        node("LayerNormalization", "a g g_bias", "y", axis=1),
        node("LayerNormalization", "a g g_bias", "y", axis=2),
        node("LayerNormalization", "a g g_bias", "y", stash_type=10),
        node("LayerNormalization", "a g g_bias", "y mean"),
        node("LayerNormalization", "a row g_bias", "y"),
        node("LayerNormalization", "a g row", "y"),
        node("LayerNormalization", "a one one", "y"),
        node("LayerNormalization", "a x", "y"),
        node("MatMul", "a narrow", "y"),
        node("MatMul", "a even", "y"),
        node("MatMul", "a a", "y"),
        node("MatMul", "m a", "y"),
        node("Gemm", "a m m_bias", "y"),
        node("Mul", "a one", "y"),
        node("Mul", "a a", "y"),
        node("Add", "a m_bias", "y"),
        node("Relu", "a", "y"),
    ],
    ids=lambda other: f"{other.op_type} {' '.join(other.input)}",
)
def test_what_it_can_not_compute_ends_a_body(other):
    assert targets(taken(attend(), other)) == ["a"]


@pytest.mark.parametrize(
    ("after", "end"),
    [
        ([node("Add", "b m_bias", "y")], "y"),
        ([node("Add", "m_bias b", "c"), node("Relu", "c", "y")], "y"),
        ([node("Gelu", "b", "y")], "y"),
        ([node("Add", "b a", "y")], "y"),
        ([node("Gelu", "b", "c"), node("Add", "x c", "y")], "y"),
        ([node("Gelu", "b", "y", approximate="tanh")], "b"),
        ([node("Add", "b one", "y")], "b"),
        ([node("Add", "b row", "y")], "b"),
        ([node("Add", "b matrix", "y")], "b"),
        ([node("Add", "b b", "y")], "b"),
        ([node("Relu", "b", "c"), node("Add", "c m_bias", "y")], "c"),
        ([node("Relu", "b", "c"), node("Gelu", "c", "y")], "c"),
        ([node("Add", "b a", "c"), node("Add", "c m_bias", "y")], "c"),
        ([node("Add", "b a", "c"), node("Relu", "c", "y")], "c"),
        ([node("Add", "b m_bias", "c"), node("Add", "c g_bias", "y")], "c"),
        ([node("Sigmoid", "b", "s"), node("Mul", "b s", "y")], "b"),
        ([node("Add", "b largest", "y")], "b"),
        ([node("Add", "b m_bias", "y"), node("Relu", "y", "dead")], "y"),
    ],
)
def test_what_a_product_takes_on_and_gives_is_what_it_is_to_onnx_runtime(directory, monkeypatch, after, end):
    nodes = (*BESIDE, attend(), node("MatMul", "a m", "b"), *after)
    content = program(*nodes, known=tuple(name for name in "abc"))
    assert targets(body_of(content, LANES)) == ["a", end]
    inputs = {"x": np.random.default_rng(3).standard_normal((5, WIDTH, WIDTH), "f4")}
    got = engine(directory, content, monkeypatch).run(inputs)["y"]
    np.testing.assert_allclose(got, by_onnx_runtime(content, inputs), rtol=0, atol=1e-4)


def test_masks_and_factors_come_from_elsewhere(directory, monkeypatch):
    """Those that the blocks themselves lead to are none: the block ends before."""
    counts = [node("ReduceMax", "a axis2", "most"), node("Squeeze", "most axis2", "flat"),
              node("Cast", "flat", "late", to=TensorProto.INT32)]  # fmt: skip
    assert targets(taken(attend(), *counts, attend("a", "y", "late"))) == ["a"]
    most = node("ReduceMax", "a axis2", "most")
    assert targets(taken(attend(), most, attend("a", "b"), node("Mul", "b most", "y"))) == ["a"]
    content = program(attend(mask="shows"), node("Mul", "factor a", "y"), inputs=(MASK, FACTOR))
    body = body_of(content, LANES)
    assert (body.masks, body.factors, targets(body)) == (["shows"], ["factor"], ["y"])
    rng = np.random.default_rng(2)
    good = {
        "x": rng.standard_normal((4, 6, WIDTH), "f4"), "shows": rng.integers(0, 2, (4, 6), "i4"),
        "factor": rng.standard_normal((4, 1, 1), "f4"),
    }  # fmt: skip
    made = engine(directory, content, monkeypatch, MASK, FACTOR)
    np.testing.assert_allclose(made.run(good)["y"], by_onnx_runtime(content, good), rtol=0, atol=1e-5)
    for name, bad in (("shows", good["shows"][:, :5]), ("shows", good["shows"].astype("i8")), ("factor", good["x"][:, :, :1]),
                      ("factor", good["factor"][:3]), ("shows", np.int32([1, 2, 3, 4]))):  # fmt: skip
        with pytest.raises(EngineError, match=f"'{name}': want"):
            made.run(good | {name: bad})


def test_what_is_no_factor_is_known_before_any_request(directory, monkeypatch):
    """Of a shape the program says nothing: each is computed for two rows."""
    whole = helper.make_tensor_value_info("factor", TensorProto.FLOAT, TOKENS)
    content = program(attend(), node("Mul", "a factor", "y"), inputs=(whole,))
    with pytest.raises(
        EngineError, match=r"can't run it: 'factor': want float32 \[2, 1, 1\], got float32 \[2, 10, 32\]"
    ):
        engine(directory, content, monkeypatch, whole)


def test_values_that_are_left_out_hide_nothing():
    """A node beside the blocks may leave outputs and inputs out: none of them is a value."""
    assert targets(taken(node("Dropout", "x", "d -"), attend(), attend("a", "b"), node("Mul", "b d", "y"))) == [
        "a",
        "b",
    ]
