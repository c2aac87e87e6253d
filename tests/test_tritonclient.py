"""Stock clients, unmodified, in their own environment, against a real server: tritonclient, and one by reflection."""

import gzip
import json
import subprocess
import urllib.request
from pathlib import Path

import numpy as np
from serving import running
from test_server_inference import offline
from test_server_operations import samples, value

from layercast.models import zoo
from layercast.models.artefact import module_from_card
from layercast.models.export.writer import export_artefact

SCRIPT = Path(__file__).parent / "tritonclient_script.py"
REFLECTION_SCRIPT = Path(__file__).parent / "reflection_script.py"


def run(python: str, *arguments: str, script: Path = SCRIPT, timeout: float = 240) -> str:
    done = subprocess.run(
        [python, "-W", "ignore", str(script), *arguments], capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_call_of_the_stock_client_works(served, stock_python):
    assert "every call works" in run(stock_python, "calls", served.url)


def test_its_streams_work(served, stock_python):
    assert "streams work" in run(stock_python, "stream", served.url)


def test_a_client_without_proto_files_calls_everything_by_reflection(served, stock_python):
    assert "reflection works" in run(stock_python, served.url, script=REFLECTION_SCRIPT)


def test_its_answers_equal_an_offline_forward(served, modules, stock_python, tmp_path):
    x = np.random.default_rng(1).random((50, 1, 28, 28), dtype="f4")
    np.save(tmp_path / "x.npy", x)
    run(stock_python, "infer", served.url, str(tmp_path))
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), offline(modules["mnist"], x), atol=1e-4)


def unpacked(path: Path) -> bytes:
    return gzip.decompress(path.read_bytes())


def test_ten_thousand_digits_from_sixteen_threads(data_directory, stock_python, tmp_path):
    """The whole test set through the zoo's own model: every answer right, the card's accuracy, exact counts."""
    folder = zoo.directory("mnist")
    module = module_from_card(folder)
    card = json.loads((folder / "card.json").read_text())
    export_artefact(module, card, tmp_path / "repository" / "mnist" / "1", programs=("torchscript",))
    images = np.frombuffer(unpacked(data_directory / "mnist" / "t10k-images-idx3-ubyte.gz")[16:], np.uint8)
    labels = np.frombuffer(unpacked(data_directory / "mnist" / "t10k-labels-idx1-ubyte.gz")[8:], np.uint8)
    x = images.reshape(-1, 1, 28, 28).astype("f4") / 255
    np.save(tmp_path / "x.npy", x)
    with running(tmp_path / "repository", engine="torchscript") as server:
        run(stock_python, "threads", server.url, str(tmp_path))
        with urllib.request.urlopen(server.metrics, timeout=10) as response:
            found = samples(response.read().decode())
    got = np.load(tmp_path / "logits.npy")
    np.testing.assert_allclose(got, offline(module, x), atol=1e-4, rtol=1e-4)
    assert round(float((got.argmax(1) == labels).mean()), 4) == card["metrics"]["accuracy"]
    own = {"model": "mnist", "version": "1"}
    assert value(found, "layercast_rows_total", **own) == 10_000
    assert value(found, "layercast_batch_rows_sum", **own) == 10_000
    requests = value(found, "layercast_requests_total", kind="predict", code="OK", **own)
    assert value(found, "layercast_batch_rows_count", **own) < requests
