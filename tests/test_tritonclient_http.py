"""The stock tritonclient over HTTP, unmodified, in its own environment, against a real server."""

from pathlib import Path

import numpy as np
import pytest
from test_server_inference import offline
from test_tritonclient import run

SCRIPT = Path(__file__).parent / "tritonclient_http_script.py"


def address(served) -> str:
    return served.http.removeprefix("http://")


@pytest.mark.parametrize("what", ["calls", "aio"])
def test_every_call_of_the_stock_client_works(served, stock_python, what):
    assert "every call works" in run(stock_python, what, address(served), script=SCRIPT)


def test_its_answers_equal_an_offline_forward_in_both_forms(served, modules, stock_python, tmp_path):
    x = np.random.default_rng(1).random((50, 1, 28, 28), dtype="f4")
    np.save(tmp_path / "x.npy", x)
    run(stock_python, "infer", address(served), str(tmp_path), script=SCRIPT)
    for binary in (True, False):
        got = np.load(tmp_path / f"logits-{binary}.npy")
        np.testing.assert_allclose(got, offline(modules["mnist"], x), atol=1e-4)
