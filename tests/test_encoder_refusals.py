"""The engine encoder on programs that are wrong: it is left out, and says why."""

from pathlib import Path

import onnx
import pytest
from encoder_programs import LANES, WIDTH, attend, engine, node, program
from test_encoder_engine import exported

from layercast.server import compiled
from layercast.server.engines.base import EngineError
from layercast.server.engines.encoder.body import body_of

pytestmark = pytest.mark.usefixtures("kernels_here")


@pytest.fixture(scope="module")
def directory() -> Path:
    """An artefact that gets other programs."""
    return exported("Plain")[1]


@pytest.mark.parametrize(
    "nodes",
    [
        [attend(target="x"), attend("x", "y")],
        [attend(), attend("a", "a"), attend("a", "y")],
        [attend(target="m"), attend("m", "y")],
        [node("Abs", "x", "qkv"), attend(target="y")],
    ],
)
def test_a_program_whose_values_share_a_name_is_refused(directory, monkeypatch, nodes):
    with pytest.raises(EngineError, match="values share a name"):
        engine(directory, program(*nodes), monkeypatch)


def spoiled(name: str, dims: list[int]) -> bytes:
    """Return a program whose weights `name` say that they are of these dimensions."""
    model = onnx.load_from_string(
        program(
            attend(),
            node("LayerNormalization", "a g g_bias", "b"),
            node("MatMul", "b m", "c"),
            node("Add", "c m_bias", "y"),
        )
    )
    (weights,) = (weight for weight in model.graph.initializer if weight.name == name)
    weights.dims[:] = dims
    return model.SerializeToString()


@pytest.mark.parametrize(
    "content",
    [
        b"nothing",
        program(node("Abs", "x", "y")),
        program(attend(), node("Abs", "a", "y")),  # nobody says of what type `a` is
        program(attend(), node("MatMul", "a up", "b"), attend("b", "y")),
        program(attend(), node("MatMul", "a up", "b"), node("Add", "b x", "y")),
        program(attend("one", "y")),
        program(attend(target="y", num_heads=2.0)),
        program(attend(target="y", num_heads="2")),
        program(attend(target="y", scale="wide")),
        spoiled("qkv", [WIDTH, 6 * WIDTH]),
        spoiled("qkv", [1 << 40, 3 * WIDTH]),
        spoiled("g", [1 << 20]),
        spoiled("m", [2 * WIDTH, WIDTH]),
        spoiled("m", [-1, -WIDTH]),
        spoiled("m_bias", [WIDTH // 2]),
    ],
)  # fmt: skip
def test_whatever_is_wrong_it_is_left_out(directory, monkeypatch, content):
    with pytest.raises(EngineError, match="engine encoder can't"):
        engine(directory, content, monkeypatch)


@pytest.mark.parametrize(("name", "dims"), [("qkv", [-1, 3 * WIDTH]), ("m", [-1, WIDTH])])
def test_a_dimension_that_is_not_told_is_that_of_the_numbers(name, dims):
    body = body_of(spoiled(name, dims), LANES)
    assert [step.weights.shape for step in body.steps] == [(WIDTH, 3 * WIDTH), (WIDTH,), (WIDTH, WIDTH)]


def test_a_library_that_is_broken_is_told_without_its_path(directory, tmp_path, monkeypatch):
    broken = tmp_path / "encoder-v4.so"
    broken.write_bytes(b"no library")
    monkeypatch.setattr(compiled, "kernel", lambda name: broken)
    with pytest.raises(EngineError, match="engine encoder can't be loaded: OSError") as raised:
        engine(directory, program(attend(target="y")), monkeypatch)
    assert str(tmp_path) not in str(raised.value)
