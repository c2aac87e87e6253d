"""The functions in the kernel of the engine encoder, number by number: e^x for softmax, and GELU."""

import ctypes
import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.polynomial import chebyshev

from layercast.server import kernels

SOURCE = Path(kernels.__file__).parent / kernels.SOURCES["encoder"]
CALLS = f"""
#include "{SOURCE}"
extern "C" void exponentials(float* x, int count) {{
  for (int i = 0; i < count; i += LANES) store(x + i, exponential(load(x + i)));
}}
extern "C" void gelus(float* x, int count) {{
  for (int i = 0; i < count; i += 2 * LANES) {{
    Vector both[2] = {{load(x + i), load(x + i + LANES)}};
    gelu(both);
    store(x + i, both[0]), store(x + i + LANES, both[1]);
  }}
}}
"""
Function = Callable[[str, np.ndarray], np.ndarray]
erf = np.vectorize(math.erf)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("functions")
    (root / "functions.cpp").write_text(CALLS)
    if reason := kernels.missing():
        pytest.skip(reason)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "SOURCES", {"functions": str(root / "functions.cpp")})
        assert kernels.make(root / "made") == ""
    return root / "made"


@pytest.fixture(scope="module", params=list(kernels.LEVELS))
def function(request, folder) -> Function:
    """Compute a function of many numbers with the code for each kind of processor that this one is."""
    if not kernels.LEVELS[request.param] <= kernels.instructions():
        pytest.skip(f"this processor can't run x86-64-{request.param}")
    library = ctypes.CDLL(str(folder / f"functions-{request.param}.so"))

    def compute(name: str, x: np.ndarray) -> np.ndarray:
        padded = np.zeros(-(-len(x) // 32) * 32, "f4")
        padded[: len(x)] = x
        getattr(library, name)(ctypes.c_void_p(padded.ctypes.data), len(padded))
        return padded[: len(x)]

    return compute


def test_the_exponential_is_off_by_three_ten_millionths_at_most(function):
    x = -np.concatenate([np.linspace(0, 87, 400_001), np.geomspace(1e-30, 1, 1001), [0.0]]).astype("f4")
    got, exact = function("exponentials", x).astype("f8"), np.exp(x.astype("f8"))
    np.testing.assert_allclose(got, exact, rtol=3e-7, atol=2.0**-126)
    assert function("exponentials", np.float32([0, -0.0])).tolist() == [1, 1]


def test_the_exponential_of_what_is_far_below_is_next_to_nothing_and_of_no_number_is_none(function):
    far = function("exponentials", np.float32([-87.1, -104, -1e4, -3.4e38, -np.inf]))
    assert ((far >= 0) & (far < 2e-38)).all()
    assert np.isnan(function("exponentials", np.float32([np.nan]))).all()


def test_gelu_is_off_by_a_millionth_at_most(function):
    x = np.concatenate([np.linspace(-6, 6, 400_001), np.linspace(-20, 20, 4001), np.geomspace(1e-30, 1, 999)])
    x = x.astype("f4")
    exact = x * 0.5 * (1 + erf(x.astype("f8") / math.sqrt(2)))
    error = np.abs(function("gelus", x) - exact)
    assert error[np.abs(x) <= 6].max() < 1e-6
    assert (error <= 2e-7 * np.abs(x)).all(), "further out, the last bit is more than that"
    np.testing.assert_allclose(function("gelus", np.float32([1e4, 3e38])), [1e4, 3e38], rtol=1e-6)
    assert np.abs(function("gelus", np.float32([-1e4]))[0]) < 1e4 * 1e-7
    assert function("gelus", np.float32([0, -0.0, np.inf])).tolist() == [0, 0, np.inf]
    assert np.isnan(function("gelus", np.float32([np.nan]))).all()


def test_the_polynomial_of_erf_is_found_again():
    """Lawson's algorithm: fit by least squares, and count each point the more the further off it was."""
    source = SOURCE.read_text()
    (listed,) = re.findall(r"ERF\[TERMS\] = \{([^}]*)\}", source)
    coefficients = [float(number.strip().rstrip("f")) for number in listed.split(",")]
    (limit,) = (float(number) for number in re.findall(r"LIMIT = ([\d.]+)f;", source))
    nodes = 1000
    s = np.cos((np.arange(nodes) + 0.5) * np.pi / nodes)
    x = np.sqrt((s + 1) / 2) * limit
    terms, weights = chebyshev.chebvander(s, len(coefficients) - 1) * x[:, None], np.ones(nodes)
    for _ in range(200):
        root = np.sqrt(weights)
        fitted, *_ = np.linalg.lstsq(terms * root[:, None], erf(x) * root, rcond=None)
        weights = weights * np.abs(terms @ fitted - erf(x))
        weights *= nodes / weights.sum()
    np.testing.assert_allclose(coefficients[::-1], chebyshev.cheb2poly(fitted), rtol=0, atol=2e-7)
    everywhere = np.linspace(0, limit, 100_001)
    off = everywhere * np.polyval(coefficients, 2 * everywhere**2 / limit**2 - 1) - erf(everywhere)
    assert np.abs(off).max() < 1e-7
    assert 1 - math.erf(limit) < 5e-8, "what it is taken for further out"
