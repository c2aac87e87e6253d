"""Downloads against a local server that misbehaves in every way that servers do."""

import hashlib
import io
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from layercast.models.data import DataError, download, sources
from layercast.models.data.cifar import load_cifar10

CONTENT = np.random.default_rng(7).integers(0, 256, 700_000).astype(np.uint8).tobytes()
REAL = {"size": len(CONTENT), "sha256": hashlib.sha256(CONTENT).hexdigest()}


class Server(ThreadingHTTPServer):
    """Serves CONTENT; `behaviours` says how, one entry a request, and well once they are used up."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = CONTENT
        self.files: dict[str, bytes] = {}
        self.behaviours: list[str] = []
        self.ranges: list[str | None] = []
        self.released = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/file"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/missing":
            return self.send_error(404)
        asked = self.headers.get("Range")
        self.server.ranges.append(asked)
        how = self.server.behaviours.pop(0) if self.server.behaviours else "well"
        if how == "error":
            return self.send_error(503)
        if how == "hang":
            self.server.released.wait(10)
            return None
        if how == "drop":
            return None
        if how == "redirect":
            self.send_response(302)
            self.send_header("Location", self.server.url.replace("/file", self.path))
            self.send_header("Content-Length", "0")
            return self.end_headers()
        content, start = self.server.files.get(self.path, self.server.content), 0
        if how == "other content":
            content = bytes(len(content))
        if asked and how not in ("ignores ranges", "not satisfiable"):
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if how == "wrong range":
                start = 0
        if how == "not satisfiable":
            return self.send_error(416)
        return self.answer(how, content, start)

    def answer(self, how: str, content: bytes, start: int) -> None:
        body = content[start:] + (b"extra" * 1000 if how == "too long" else b"")
        partial = start or how == "wrong range"
        self.send_response(206 if partial else 200)
        if partial:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if how != "no length":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 3] if how == "breaks off" else body)


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield running
    running.released.set()
    running.shutdown()
    running.server_close()
    thread.join()


def fetch(server: Server, directory: Path, *urls: str, timeout: float = 5.0) -> Path:
    remote = download.Remote("file", urls or (server.url,), **REAL)
    return download.download(remote, directory, lambda line: None, timeout)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize(
    "behaviours",
    [
        [],
        ["redirect"],
        ["no length"],
        ["breaks off"],
        ["breaks off", "breaks off", "breaks off"],
        ["breaks off", "ignores ranges"],
        ["breaks off", "wrong range"],
        ["breaks off", "not satisfiable"],
        ["breaks off", "error", "drop"],
        ["error", "error", "error"],
        ["other content"],
        ["too long"],
        ["not satisfiable"],
    ],
    ids=", ".join,
)
def test_the_file_arrives_whole_or_is_fetched_until_it_does(tmp_path: Path, server: Server, behaviours: list[str]):
    server.behaviours = list(behaviours)
    path = fetch(server, tmp_path)
    assert path.read_bytes() == CONTENT
    assert names(tmp_path) == ["file"]


def test_a_broken_connection_goes_on_where_it_ended(tmp_path: Path, server: Server):
    server.behaviours = ["breaks off"]
    fetch(server, tmp_path)
    assert server.ranges == [None, f"bytes={len(CONTENT) // 3}-"]


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        ("other content", "isn't the published file"),
        ("too long", "isn't the published file"),
        ("error", "503"),
        ("redirect", "the server answered 302 .*infinite loop"),
        ("drop", "closed connection|Connection reset"),
    ],
)
def test_what_never_comes_right_is_refused_and_never_in_place(
    tmp_path: Path, server: Server, behaviour: str, message: str
):
    server.behaviours = [behaviour] * 20
    with pytest.raises(DataError, match=message) as caught:
        fetch(server, tmp_path)
    assert "\n" not in str(caught.value)
    assert "file" not in names(tmp_path)


def test_a_second_call_goes_on_from_what_the_first_left(tmp_path: Path, server: Server):
    server.behaviours = ["breaks off", "error", "error", "error"]
    with pytest.raises(DataError, match="503"):
        fetch(server, tmp_path)
    assert names(tmp_path) == ["file.partial"]
    assert (tmp_path / "file.partial").read_bytes() == CONTENT[: len(CONTENT) // 3]
    server.ranges.clear()
    assert fetch(server, tmp_path).read_bytes() == CONTENT
    assert server.ranges == [f"bytes={len(CONTENT) // 3}-"]
    assert names(tmp_path) == ["file"]


def test_a_whole_partial_file_needs_no_server(tmp_path: Path):
    (tmp_path / "file.partial").write_bytes(CONTENT)
    remote = download.Remote("file", ("http://127.0.0.1:9/file",), **REAL)
    assert download.download(remote, tmp_path, lambda line: None).read_bytes() == CONTENT


@pytest.mark.parametrize("junk", [b"<html>" * 100, CONTENT + b"!", bytes(len(CONTENT))], ids=["short", "long", "same"])
def test_a_partial_file_of_something_else_is_thrown_away(tmp_path: Path, server: Server, junk: bytes):
    (tmp_path / "file.partial").write_bytes(junk)
    assert fetch(server, tmp_path).read_bytes() == CONTENT
    assert names(tmp_path) == ["file"]


def test_a_hanging_server_is_given_up(tmp_path: Path, server: Server):
    server.behaviours = ["hang"] * 4
    with pytest.raises(DataError, match="timed out"):
        fetch(server, tmp_path, timeout=0.05)


def test_the_next_address_is_tried(tmp_path: Path, server: Server):
    missing = server.url.replace("/file", "/missing")
    assert fetch(server, tmp_path, missing, "http://127.0.0.1:9/", server.url).read_bytes() == CONTENT
    with pytest.raises(DataError, match=r"/missing: the server answered 404 .*127\.0\.0\.1:9/: .*refused"):
        fetch(server, tmp_path / "other", missing, "http://127.0.0.1:9/")


def test_a_file_of_the_users_own_is_neither_used_nor_replaced(tmp_path: Path, server: Server):
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(DataError, match="isn't the published file; move it away"):
        fetch(server, tmp_path)
    assert (tmp_path / "file").read_bytes() == b"mine"
    assert server.ranges == []


def test_a_right_file_is_not_fetched_again(tmp_path: Path, server: Server):
    fetch(server, tmp_path)
    server.ranges.clear()
    fetch(server, tmp_path)
    assert server.ranges == []


def serve(server: Server, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes) -> None:
    """Let the source called `name` be CONTENT's server with other content."""
    remote = getattr(sources, name)
    server.content = content
    digest = hashlib.sha256(content).hexdigest()
    monkeypatch.setattr(sources, name, download.Remote(remote.name, (server.url,), len(content), digest))


def tar(files: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return packed.getvalue()


CIFAR_FILES = {
    **{f"cifar-10-batches-bin/data_batch_{number}.bin": bytes([number]) + bytes(3072) for number in range(1, 6)},
    "cifar-10-batches-bin/test_batch.bin": bytes(3073),
    "cifar-10-batches-bin/batches.meta.txt": b"a b c d e f g h i j\n",
    "../outside": b"escaped",
}


def test_the_cifar_archive_becomes_files_that_load(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch):
    serve(server, monkeypatch, "CIFAR10", tar(CIFAR_FILES))
    target = tmp_path / "cifar10"
    sources.fetch("cifar10", target, lambda line: None)
    assert load_cifar10(target).train_targets.tolist() == [1, 2, 3, 4, 5]
    assert names(target) == ["cifar-10-batches-bin"]
    assert names(tmp_path) == ["cifar10"]
    server.ranges.clear()
    sources.fetch("cifar10", target, lambda line: None)
    assert server.ranges == []


def test_an_archive_without_a_wanted_file_is_refused(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch):
    serve(server, monkeypatch, "CIFAR10", tar({"cifar-10-batches-bin/data_batch_1.bin": bytes(3073)}))
    with pytest.raises(DataError, match=r"data_batch_2\.bin in it, got none"):
        sources.fetch("cifar10", tmp_path, lambda line: None)
    assert not (tmp_path / "cifar-10-batches-bin").exists()


def test_the_spam_archive_becomes_its_text_file(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("SMSSpamCollection", "ham\thello\n")
        archive.writestr("readme", "…")
    serve(server, monkeypatch, "SMS_SPAM", packed.getvalue())
    sources.fetch("sms_spam", tmp_path, lambda line: None)
    assert (tmp_path / "SMSSpamCollection").read_text() == "ham\thello\n"
    assert names(tmp_path) == ["SMSSpamCollection"]


def test_mnist_files_that_are_there_are_left_alone(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        sources, "MNIST", tuple(download.Remote(remote.name, (server.url,), **REAL) for remote in sources.MNIST)
    )
    (tmp_path / "train-images-idx3-ubyte").write_bytes(b"mine")
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(b"mine too")
    sources.fetch("mnist", tmp_path, lambda line: None)
    assert len(server.ranges) == 2
    assert (tmp_path / "t10k-images-idx3-ubyte.gz").read_bytes() == b"mine too"
    assert (tmp_path / "t10k-labels-idx1-ubyte.gz").read_bytes() == CONTENT
    assert not (tmp_path / "train-images-idx3-ubyte.gz").exists()


def test_the_published_hashes_are_hashes_and_addresses_are_encrypted():
    for remote in (*sources.MNIST, sources.CIFAR10, sources.SMS_SPAM):
        assert len(bytes.fromhex(remote.sha256)) == 32
        assert all(url.startswith("https://") for url in remote.urls)
    with pytest.raises(ValueError, match="no source for the data set 'other'"):
        sources.fetch("other", Path(), lambda line: None)
