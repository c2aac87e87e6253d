"""`layercast train --download` from a server that breaks off, and what an interrupted download leaves."""

import gzip
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from test_data_download import Server, server  # noqa: F401  # the fixture
from test_data_idx import idx

from layercast.client.main import main
from layercast.models.data import download, sources

pytestmark = pytest.mark.usefixtures("one_thread")

IMAGES = np.random.default_rng(0).integers(0, 256, (40, 28, 28)).astype(np.uint8)
LABELS = (np.arange(40) % 10).astype(np.uint8)


class Files:
    """MNIST's four files on the misbehaving server, under their own names."""

    def __init__(self, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
        server.files = {}
        remotes = []
        for remote in sources.MNIST:
            content = gzip.compress(idx(IMAGES if "images" in remote.name else LABELS))
            server.files[f"/{remote.name}"] = content
            url = server.url.replace("/file", f"/{remote.name}")
            remotes.append(download.Remote(remote.name, (url,), len(content), hashlib.sha256(content).hexdigest()))
        monkeypatch.setattr(sources, "MNIST", tuple(remotes))


def train(directory: Path, *more: str) -> int:
    data = str(directory / "data")
    return main(["train", "mnist", "--data", data, "--output", str(directory / "out"), "--epochs", "1", *more])


def names(directory: Path) -> set[str]:
    return {path.name for path in (directory / "data" / "mnist").iterdir()}


def test_what_is_missing_is_fetched_and_trained_on(
    tmp_path: Path,
    server: Server,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    Files(server, monkeypatch)
    assert train(tmp_path) == 1, "nothing is fetched unasked"
    assert server.ranges == []
    server.behaviours = ["breaks off", "error", "redirect", "well", "other content"]
    assert train(tmp_path, "--download") == 0
    assert names(tmp_path) == {remote.name for remote in sources.MNIST}
    assert "fetching http://127.0.0.1" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "mnist" / "card.json").read_text())["data"]["train_rows"] == 40
    asked = len(server.ranges)
    assert train(tmp_path, "--download", "--fresh") == 0
    assert len(server.ranges) == asked


def test_a_download_that_fails_exits_with_1_and_the_next_goes_on(
    tmp_path: Path,
    server: Server,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    Files(server, monkeypatch)
    server.behaviours = ["well", "breaks off", *["error"] * 3]
    assert train(tmp_path, "--download") == 1
    error = capsys.readouterr().err
    assert error.startswith("layercast: http://127.0.0.1")
    assert error.count("\n") == 1
    first, second = (remote.name for remote in sources.MNIST[:2])
    assert names(tmp_path) == {first, f"{second}.partial"}
    server.ranges.clear()
    assert train(tmp_path, "--download") == 0
    assert server.ranges[0] == f"bytes={len(server.files[f'/{second}']) // 3}-"
    assert names(tmp_path) == {remote.name for remote in sources.MNIST}
