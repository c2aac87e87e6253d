"""The kernel of the engine encoder: blocks of many sizes against torch's in float64."""

from dataclasses import replace
from pathlib import Path

import compiled_kernels
import numpy as np
import pytest
from encoder_bodies import LOWEST, attention, check, linear, norm, post_norm, pre_norm, run, values_for, wanted

from layercast.server import compiled, kernels
from layercast.server.engines.base import EngineError
from layercast.server.engines.encoder.body import Body
from layercast.server.engines.encoder.library import Library
from layercast.server.engines.encoder.plan import Memory, Plan
from layercast.server.engines.native.kernel import Crew

LENGTHS = [1, 2, 15, 16, 17, 47, 48, 49, 97, 200]
PADDED = {"mask": "mask", "factor": "factor", "hidden": LOWEST}


@pytest.fixture(scope="module", params=list(kernels.LEVELS))
def library(request, kernels_folder) -> Library:
    """Each library that this processor can run."""
    return Library(compiled_kernels.library_of("encoder", request.param, kernels_folder))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("block", [post_norm, pre_norm])
@pytest.mark.parametrize("also", [{}, PADDED], ids=["whole", "padded"])
def test_texts_of_any_length(library, block, also, length):
    body = block(library.kernel.lanes, **also)
    for rows in (1, 5):
        values = values_for(body, rows, length)
        check(run(library, body, values), wanted(body, values))


@pytest.mark.parametrize("vectors", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("heads", [1, 3])
def test_heads_of_any_size(library, heads, vectors):
    for body in (
        post_norm(library.kernel.lanes, heads, vectors),
        pre_norm(library.kernel.lanes, heads, vectors, **PADDED),
    ):
        values = values_for(body, 3, 21)
        check(run(library, body, values), wanted(body, values))


@pytest.mark.parametrize("into", [1, 7, 64, 65])
def test_attention_reads_tokens_of_any_width(library, into):
    body = post_norm(library.kernel.lanes, 2, 1, into)
    values = values_for(body, 3, 18)
    check(run(library, body, values), wanted(body, values))


@pytest.mark.parametrize("vectors", range(1, 10))
def test_products_of_any_width(library, vectors):
    """The last panel of columns may be narrower, and the last rows fewer than are computed together."""
    width = library.kernel.lanes * vectors
    steps = (
        norm("x", "n", width),
        linear("n", "wide", width, 3 * width, activation="gelu"),
        linear("wide", "narrow", 3 * width, width, addend="x"),
        attention("narrow", "y", width, 1, width),
    )
    body = Body("x", "y", steps)
    for tokens in range(1, 14):
        values = values_for(body, 1, tokens)
        check(run(library, body, values), wanted(body, values))


def test_values_that_are_needed_later_are_kept(library):
    """Four of one width are: the input, what two steps add, and what lies between; one is computed for nothing."""
    width = 2 * library.kernel.lanes
    steps = (
        linear("x", "a", width, width),
        linear("x", "unused", width, width),
        attention("x", "b", width, 2, library.kernel.lanes),
        linear("b", "c", width, width, addend="a"),
        norm("c", "d", width),
        linear("d", "e", width, width, addend="x"),
        linear("e", "f", width, width, addend="a"),
        linear("f", "g", width, width, activation="relu", addend="e"),
        linear("g", "y", width, width, addend="g"),
    )
    body = Body("x", "y", steps)
    values = values_for(body, 7, 30)
    before = values["x"].copy()
    check(run(library, body, values), wanted(body, values))
    np.testing.assert_array_equal(values["x"], before)


@pytest.mark.parametrize("hidden", [-3.0, -60.0, LOWEST])
def test_each_attention_may_have_a_mask_and_a_factor_of_its_own(library, hidden):
    """What hides may do so in part; a row that is hidden altogether and has no factor attends to all of it."""
    width, lanes = 2 * library.kernel.lanes, library.kernel.lanes
    steps = (
        attention("x", "a", width, 2, lanes, mask="one", hidden=hidden),
        attention("a", "b", width, 2, lanes, factor="weight"),
        attention("b", "c", width, 2, lanes, mask="two", factor="other", hidden=hidden),
        attention("c", "y", width, 2, lanes, mask="one", factor="weight", hidden=hidden),
    )
    body = Body("x", "y", steps)
    values = values_for(body, 6, 19)
    rng = np.random.default_rng(5)
    values["two"] = rng.integers(-1, 3, (6, 19), "i4")  # as ONNX Runtime, it attends to what is above 0
    values["other"] = rng.uniform(-2, 2, (6, 1, 1)).astype("f4")
    check(run(library, body, values), wanted(body, values), 5e-5)


def test_one_token_among_many_may_have_all_the_attention(library):
    width = library.kernel.lanes
    sharp = replace(attention("x", "y", width, 1, width), scale=300.0)
    body = Body("x", "y", (sharp,))
    values = values_for(body, 2, 60)
    check(run(library, body, values), wanted(body, values), 1e-3)
    even = Body("x", "y", (replace(sharp, scale=1e-30),))
    check(run(library, even, values), wanted(even, values))


@pytest.mark.parametrize("block", [post_norm, pre_norm])
def test_what_is_not_a_number_stays_so_and_in_its_own_row(library, block):
    body = block(library.kernel.lanes, **PADDED)
    values = values_for(body, 7, 20)
    values["mask"][:], values["factor"][:] = 1, 1
    want = run(library, body, values)
    spoiled = dict(values, x=values["x"].copy())
    spoiled["x"][2, 3, 1] = np.nan
    spoiled["x"][4, 0, 0] = np.inf
    spoiled["x"][6, 19, 2] = -np.inf
    got = run(library, body, spoiled)
    assert np.isnan(got[2, 3]).all()
    for row in (2, 4, 6):
        assert np.isnan(got[row]).all(), "every token attends to the one that is not a number"
    for row in (0, 1, 3, 5):
        np.testing.assert_array_equal(got[row], want[row])


@pytest.mark.parametrize("bad", [np.nan, np.inf, 3e38])
def test_what_an_earlier_batch_left_in_memory_changes_nothing(library, bad):
    body = pre_norm(library.kernel.lanes, 2, 2, **PADDED)
    memory = Memory()
    for rows, length in ((9, 33), (1, 200), (3, 7), (40, 3), (2, 50), (5, 16), (1, 1), (8, 31)):
        spoiled = values_for(body, 8, 40)
        spoiled["x"][:] = bad
        run(library, body, spoiled, memory=memory)
        values = values_for(body, rows, length)
        np.testing.assert_array_equal(
            run(library, body, values, memory=memory), run(library, body, values), str((rows, length))
        )


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ((attention("x", "a", 8, 1, 16),), "for 8 numbers a token follows one that gives 32"),
        ((attention("x", "a", 32, 2, 16), norm("a", "y", 16)), "for 16 numbers a token follows one that gives 32"),
        ((attention("x", "a", 32, 1, 16), linear("a", "y", 16, 16, addend="x")), "values of different shapes"),
        ((attention("x", "a", 32, 2, 16), norm("a", "a", 32)), "values share a name"),
        ((attention("x", "x", 32, 2, 16),), "values share a name"),
    ],
)
def test_what_does_not_fit_together_is_refused(library, steps, message):
    with pytest.raises(EngineError, match=message):
        Plan(library, Body("x", steps[-1].target, steps), 32)


def test_values_of_other_shapes_never_reach_the_library(library, monkeypatch):
    body = post_norm(library.kernel.lanes, **PADDED)
    good = values_for(body, 3, 9)
    x, mask, factor = good["x"], good["mask"], good["factor"]
    plan, crew = Plan(library, body, x.shape[2]), Crew(library.kernel, 1)
    monkeypatch.setattr(library, "run", None)
    for name, bad in (
        ("x", x[..., :-1]), ("x", x[0]), ("x", x[..., None]), ("x", x.astype("f8")), ("x", x.astype(">f4")),
        ("x", np.float32(1)), ("x", x[:2]), ("x", x[:, :8]),
        ("mask", mask[:, :-1]), ("mask", mask[:2]), ("mask", mask.astype("i8")), ("mask", mask.astype("f4")),
        ("mask", mask[:, None]), ("mask", mask.ravel()), ("factor", factor[:2]), ("factor", factor[..., 0]),
        ("factor", factor.astype("f8")), ("factor", np.repeat(factor, 9, 1)), ("factor", np.float32(1)),
    ):  # fmt: skip
        with pytest.raises(EngineError, match=r"want (float32|int32) \[.*\], got "):
            plan.run(good | {name: np.asarray(bad)}, crew, Memory())


def test_more_than_the_library_can_count_is_refused(library, monkeypatch):
    """By tokens, and by the numbers of one row, which is never shared."""
    body = post_norm(library.kernel.lanes)
    plan, crew = Plan(library, body, 2 * library.kernel.lanes), Crew(library.kernel, 2)
    monkeypatch.setattr(library, "run", None)
    monkeypatch.setattr(np, "ascontiguousarray", lambda array: array)
    for rows, length in ((1 << 15, 1 << 16), (1, 1 << 26), (1 << 31, 1)):
        x = np.broadcast_to(np.float32(0), (rows, length, 2 * library.kernel.lanes))
        with pytest.raises(EngineError, match=f"{rows:,} rows of {length:,} tokens are more than it computes at once"):
            plan.run({"x": x}, crew, Memory())


def test_no_rows_and_no_tokens_give_none(library):
    body = pre_norm(library.kernel.lanes, **PADDED)
    for rows, length in ((0, 9), (3, 0), (0, 0)):
        assert run(library, body, values_for(body, 1, 9) | empty(body, rows, length)).shape == (
            rows,
            length,
            library.kernel.lanes,
        )


def empty(body: Body, rows: int, length: int) -> dict[str, np.ndarray]:
    width = body.steps[0].weights.shape[0]
    return {
        "x": np.zeros((rows, length, width), "f4"), "mask": np.zeros((rows, length), "i4"),
        "factor": np.zeros((rows, 1, 1), "f4"),
    }  # fmt: skip


def test_inputs_may_be_read_only_and_not_contiguous(library):
    body = post_norm(library.kernel.lanes, **PADDED)
    values = values_for(body, 4, 11)
    want = run(library, body, values)
    spread = {name: np.repeat(array, 2, axis=0)[::2] for name, array in values.items()}
    spread["x"] = np.asfortranarray(spread["x"])
    for array in spread.values():
        array.flags.writeable = False
    np.testing.assert_array_equal(run(library, body, spread), want)


def test_the_library_is_the_one_for_this_processor(kernels_folder: Path, monkeypatch):
    monkeypatch.setattr(compiled, "_looked_in", [])
    compiled.look_in(kernels_folder)
    path = compiled.kernel("encoder")
    assert path is not None
    assert Library(path).kernel.panel == (64 if kernels.LEVELS["v4"] <= kernels.instructions() else 16)
