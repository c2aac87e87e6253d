"""A directory's rows in one file: order, resuming, what is refused, what is left out and said."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from layercast.client.embedding import parts as parts_module
from layercast.client.embedding.listing import Entry
from layercast.client.embedding.parts import Parts
from layercast.client.errors import InputError
from layercast.client.progress import Progress
from layercast.proto.messages import ExtractRequest

image_module = pytest.importorskip("PIL.Image", reason="Pillow comes with the images extra")

Run = Callable[..., tuple[int, str, str]]
FILES = 30


@pytest.fixture
def catalogue(tmp_path: Path) -> Path:
    """Pictures of one grey each, 2 to 60, in folders."""
    root = tmp_path / "catalogue"
    for number in range(FILES):
        path = root / f"{number % 3}" / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image_module.new("L", (28, 28), 2 * number + 2).save(path)
    return root


def arguments(catalogue: Path, output: Path, *more: Any) -> list[Any]:
    return ["embed", "gallery", catalogue, "--layer", "net.0@mean", "--output", output, *more]


def expected(catalogue: Path) -> tuple[list[str], np.ndarray]:
    """Paths in order, and the grey of each file's name."""
    paths = sorted(path.relative_to(catalogue).as_posix() for path in catalogue.rglob("*.png"))
    greys = [(2 * int(Path(path).stem) + 2) / 255 for path in paths]
    return paths, np.array([[grey, grey] for grey in greys], "f4")


def check(output: Path, catalogue: Path) -> None:
    paths, values = expected(catalogue)
    with np.load(output) as saved:
        assert saved["paths"].tolist() == paths
        np.testing.assert_allclose(saved["values"], values, rtol=1e-6)
        assert [str(saved[name]) for name in ("model", "version", "layer")] == ["gallery", "2", "net.0@mean"]


def rows_asked(server: Any) -> int:
    return sum(request.inputs[0].shape[0] for request in server.asked(ExtractRequest))


def test_rows_are_in_the_order_of_their_paths_however_they_are_answered(
    run: Run, server: Any, catalogue: Path, tmp_path: Path
) -> None:
    seen = threading.Barrier(4, timeout=10)

    def out_of_order(request: ExtractRequest) -> None:
        if len(server.asked(ExtractRequest)) <= 4:
            seen.wait()  # four are in flight at once

    server.before = out_of_order
    output = tmp_path / "out.npz"
    code, out, err = run(*arguments(catalogue, output, "--in-flight", "4"))
    assert (code, out, err) == (0, f"30 rows of net.0@mean, [30, 2], in {output}\n", "")
    check(output, catalogue)
    # No more than the model's max_batch, the newest version by name, and nothing left beside the output.
    asked = server.asked(ExtractRequest)
    assert {request.inputs[0].shape[0] for request in asked} == {4, 2}
    assert {request.model_version for request in asked} == {"2"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["catalogue", "out.npz"]


def test_the_same_rows_give_the_same_bytes(
    run: Run, catalogue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pyarrow")
    for ending in ("npz", "parquet"):
        outputs = [tmp_path / f"{number}.{ending}" for number in range(2)]
        assert run(*arguments(catalogue, outputs[0]))[0] == 0
        monkeypatch.setattr(parts_module, "_PART_SECONDS", 0.0)  # other parts, the same file
        assert run(*arguments(catalogue, outputs[1], "--rows", "3"))[0] == 0
        assert outputs[0].read_bytes() == outputs[1].read_bytes()


def test_parquet_has_a_column_of_vectors(run: Run, catalogue: Path, tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    output = tmp_path / "out.parquet"
    assert run(*arguments(catalogue, output))[0] == 0
    paths, values = expected(catalogue)
    table = parquet.read_table(output)
    assert table.schema.names == ["path", "model", "version", "layer", "values"]
    assert table.schema.field("values").type == arrow.list_(arrow.float32(), 2)
    assert table["path"].to_pylist() == paths
    np.testing.assert_allclose(np.stack(table["values"].to_numpy()), values, rtol=1e-6)
    assert set(table["version"].to_pylist()) == {"2"}
    halves = tmp_path / "half.parquet"
    assert run("embed", "mnist", catalogue, "--layer", "net.0@fp16", "--output", halves)[0] == 0
    assert parquet.read_schema(halves).field("values").type == arrow.list_(arrow.float16(), 3)


def test_a_run_that_was_interrupted_goes_on_where_it_was(
    run: Run, server: Any, catalogue: Path, tmp_path: Path
) -> None:
    whole, output = tmp_path / "whole.npz", tmp_path / "out.npz"
    assert run(*arguments(catalogue, whole))[0] == 0
    server.requests.clear()

    def interrupt(request: ExtractRequest) -> None:
        if len(server.asked(ExtractRequest)) == 4:
            os.kill(os.getpid(), signal.SIGINT)
            server.released.wait(10)

    server.before = interrupt
    code, out, err = run(*arguments(catalogue, output, "--in-flight", "1"))
    server.released.set()
    assert (code, out) == (130, "")
    assert err == "layercast: stopped: 12 of 30 files are done; the same command goes on from there\n"
    assert not output.exists()
    server.requests.clear()
    server.before = lambda request: None
    assert run(*arguments(catalogue, output))[0] == 0
    assert rows_asked(server) == FILES - 12
    assert output.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["catalogue", "out.npz", "whole.npz"]


def test_a_killed_run_keeps_its_whole_parts(run: Run, server: Any, catalogue: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.npz"
    held = threading.Event()

    def hold(request: ExtractRequest) -> None:
        if len(server.asked(ExtractRequest)) > 4:
            held.set()
            server.released.wait(30)

    server.before = hold
    code = (
        "import sys, layercast.client.embedding.parts as parts; parts._PART_ROWS = 4\n"
        "from layercast.client.main import main; sys.exit(main())"
    )
    command = [str(each) for each in arguments(catalogue, output, "--in-flight", "1", "--url", server.url)]
    folder = tmp_path / "out.npz.parts"
    with subprocess.Popen([sys.executable, "-c", code, *command]) as process:
        assert held.wait(30)
        until = time.monotonic() + 30
        while not list(folder.glob("000003.npz")) and time.monotonic() < until:
            time.sleep(0.01)
        with pytest.raises(InputError, match="another process writes to"), Parts.opened(folder, {}, False):
            pass
        process.kill()
    server.released.set()
    (folder / "000004.npz.partial").write_bytes(b"half")
    (folder / "000002.npz").write_bytes(b"damaged by the disk")
    server.requests.clear()
    assert run(*arguments(catalogue, output))[0] == 0
    assert rows_asked(server) == FILES - 12
    check(output, catalogue)


def stopped_run(run: Run, server: Any, catalogue: Path, output: Path) -> None:
    """Leave parts of 8 files behind."""
    server.before = lambda request: grpc.StatusCode.INTERNAL if len(server.asked(ExtractRequest)) > 2 else None
    code, _, err = run(*arguments(catalogue, output, "--in-flight", "1"))
    assert (code, "the test wants INTERNAL" in err) == (1, True)
    server.requests.clear()
    server.before = lambda request: None


def test_another_version_or_layer_does_not_mix(run: Run, server: Any, catalogue: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.npz"
    stopped_run(run, server, catalogue, output)
    server.versions = ["2", "3", "10"]
    code, _, err = run(*arguments(catalogue, output))
    assert code == 1
    assert "rows of another job (version '2', now '10')" in err
    assert "--restart" in err
    assert run(*arguments(catalogue, output, "--layer", "net.1@mean", "--version", "2"))[0] == 1
    assert server.asked(ExtractRequest) == []
    assert run(*arguments(catalogue, output, "--version", "2"))[0] == 0
    assert rows_asked(server) == FILES - 8
    check(output, catalogue)
    server.versions = ["2"]
    stopped_run(run, server, catalogue, output)
    assert run(*arguments(catalogue, output, "--layer", "net.1@mean", "--restart"))[0] == 0
    assert rows_asked(server) == FILES


def test_files_that_cannot_be_read_are_listed_and_asked_for_when_mended(
    run: Run, server: Any, catalogue: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.npz"
    (catalogue / "0" / "bad.png").write_bytes(b"nonsense")
    (catalogue / "gone.png").symlink_to("nowhere")
    np.save(catalogue / "many.npy", np.zeros((2, 1, 28, 28), "f4"))
    code, out, err = run(*arguments(catalogue, output))
    assert code == 1
    assert out.startswith("30 rows of net.0@mean, [30, 2], in ")
    assert err.splitlines() == [
        "layercast: without 3 files that can't be read; mend or remove them and run the same command:",
        "  0/bad.png: the input is neither an image that Pillow reads nor a .npy file",
        "  gone.png: No such file or directory",
        "  many.npy: it holds 2 rows; a file stands for one",
    ]
    (catalogue / "0" / "bad.png").unlink()
    (catalogue / "gone.png").unlink()
    (catalogue / "many.npy").unlink()
    check(output, catalogue)
    image_module.new("L", (28, 28), 62).save(catalogue / "0" / "30.png")
    image_module.new("L", (29, 29), 2).save(catalogue / "1" / "01.png")  # another size, so read again
    image_module.new("L", (28, 28), 4).save(catalogue / "1" / "01.png")
    server.requests.clear()
    assert run(*arguments(catalogue, output, "--json"))[0] == 0
    assert rows_asked(server) == 2
    check(output, catalogue)


def test_what_is_no_input_is_left_out_and_counted(run: Run, catalogue: Path, tmp_path: Path) -> None:
    (catalogue / "notes.md").write_text("notes")
    (catalogue / ".hidden.png").write_bytes(b"nonsense")
    (catalogue / ".thumbs").mkdir()
    (catalogue / ".thumbs" / "x.png").write_bytes(b"nonsense")
    (catalogue / "again").symlink_to(catalogue / "0")
    code, out, _ = run(*arguments(catalogue, tmp_path / "out.npz", "--json"))
    assert code == 0
    assert json.loads(out) == {
        "model": "gallery", "version": "2", "layer": "net.0@mean", "output": str(tmp_path / "out.npz"),
        "shape": [30, 2], "unreadable": [], "left_out": {".md": 1},
    }  # fmt: skip


def test_a_server_that_restarts_is_waited_for(run: Run, server: Any, catalogue: Path, tmp_path: Path) -> None:
    later: list[Any] = []

    def restart() -> None:
        server.stop()
        later.append(type(server)(port=int(server.url.rpartition(":")[2])))

    def stop_soon(request: ExtractRequest) -> None:
        if len(server.asked(ExtractRequest)) == 3:
            threading.Thread(target=restart).start()
            server.released.wait(10)

    server.before = stop_soon
    try:
        assert run(*arguments(catalogue, tmp_path / "out.npz", "--in-flight", "2"))[0] == 0
    finally:
        for each in later:
            each.stop()
    check(tmp_path / "out.npz", catalogue)
    assert rows_asked(later[0]) >= FILES - 4 * 5


def test_patience_ends(run: Run, server: Any, catalogue: Path, tmp_path: Path) -> None:
    server.before = lambda request: grpc.StatusCode.UNAVAILABLE
    code, out, err = run(*arguments(catalogue, tmp_path / "out.npz", "--patience", "0.3"))
    assert (code, out, err) == (1, "", "layercast: the test wants UNAVAILABLE\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["catalogue"]  # no empty folder of parts


def test_what_is_too_much_for_one_message_goes_in_halves(
    run: Run, server: Any, catalogue: Path, tmp_path: Path
) -> None:
    server.before = lambda request: grpc.StatusCode.RESOURCE_EXHAUSTED if request.inputs[0].shape[0] > 1 else None
    assert run(*arguments(catalogue, tmp_path / "out.npz"))[0] == 0
    check(tmp_path / "out.npz", catalogue)
    server.before = lambda request: grpc.StatusCode.RESOURCE_EXHAUSTED
    assert run(*arguments(catalogue, tmp_path / "two.npz"))[0] == 1


def test_texts_are_files_too(run: Run, server: Any, tmp_path: Path) -> None:
    root = tmp_path / "texts"
    root.mkdir()
    for name, text in (("b", "hello\n"), ("a", "hi"), ("c", ""), ("d", "-")):
        (root / f"{name}.txt").write_text(text)
    np.save(root / "e.npy", np.array([[1, 2, 3]]))
    output = tmp_path / "out.npz"
    code, _, err = run("embed", "essays", root, "--layer", "x", "--output", output)
    assert (code, err.splitlines()[1:]) == (1, ["  c.txt: a text is empty"])
    (request,) = server.asked(ExtractRequest)
    sent = np.frombuffer(request.inputs[0].data, "<i8").reshape(request.inputs[0].shape)
    assert sent.tolist() == [[*b"hi", *[256] * 3], [*b"hello"], [*b"-", *[256] * 4], [1, 2, 3, 256, 256]]
    with np.load(output) as saved:
        assert saved["paths"].tolist() == ["a.txt", "b.txt", "d.txt", "e.npy"]


@pytest.mark.parametrize(
    ("given", "code", "text"),
    [
        (["gallery", "{}", "--layer", "x", "--output", "out.csv"], 2, "ends in neither .npz nor .parquet"),
        (["gallery", "{}", "--output", "out.npz"], 2, "required: --layer"),
        (["gallery", "{}", "--layer", "x", "--output", "out.npz", "--in-flight", "0"], 2, "0 is not positive"),
        (["gallery", "{}/0/00.png", "--layer", "x", "--output", "out.npz"], 1, "is no directory; `layercast features`"),
        (["gallery", "{}/empty", "--layer", "x", "--output", "out.npz"], 1, "holds no .png, .jpg"),
        (["unknown", "{}", "--layer", "x", "--output", "out.npz"], 1, "unknown model"),
        (["gallery", "{}", "--layer", "x", "--output", "no/out.npz"], 1, "No such file"),
        (["mnist", "{}", "--layer", "x", "--url", "localhost:1", "--output", "out.npz"], 1, "no server answers"),
    ],
)
def test_bad_arguments_and_data(
    run: Run, catalogue: Path, monkeypatch: pytest.MonkeyPatch, given: list[str], code: int, text: str
) -> None:
    (catalogue / "empty").mkdir()
    monkeypatch.chdir(catalogue)
    got, out, err = run("embed", *(each.format(catalogue) for each in given))
    assert (got, out) == (code, "")
    assert text in err


def test_parquet_without_its_package(
    run: Run, server: Any, catalogue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    code, _, err = run(*arguments(catalogue, tmp_path / "out.parquet"))
    assert (code, err) == (1, "layercast: embed needs pyarrow: pip install 'layercast[parquet]'\n")
    assert server.requests == []


def test_rows_of_two_forms_are_refused(tmp_path: Path) -> None:
    with Parts.opened(tmp_path / "parts", {}, False) as parts:
        parts.add([Entry("a", 1, 1)], np.zeros((1, 3), "f4"))
        with pytest.raises(InputError, match=r"b gives \[4\] of float32, the files before it \[3\] of float32"):
            parts.add([Entry("b", 1, 1)], np.zeros((1, 4), "f4"))
        parts.flush()
    with Parts.opened(tmp_path / "parts", {}, False) as parts:
        assert Entry("a", 1, 1) in parts
        assert Entry("a", 2, 1) not in parts
        assert Entry("a", 1, 2) not in parts
        with pytest.raises(InputError, match="reduce the layer to one size"):
            parts.add([Entry("b", 1, 1)], np.zeros((1, 3), "f8"))


def test_the_memory_of_a_part_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts_module, "_PART_BYTES", 100)
    with Parts.opened(tmp_path / "parts", {}, False) as parts:
        for number in range(10):
            parts.add([Entry(f"{number}", 1, 1)], np.full((1, 10), number, "f4"))
        parts.flush()
        assert len(list((tmp_path / "parts").glob("*.npz"))) == 4
        entries = [Entry(f"{number}", 1, 1) for number in (7, 0, 9, 3)]
        groups = list(parts.groups(entries))
        assert [paths for paths, _ in groups] == [["7", "0"], ["9", "3"]]
        assert [values[:, 0].tolist() for _, values in groups] == [[7, 0], [9, 3]]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_for_terminals() -> None:
    quiet, loud = io.StringIO(), Terminal()
    for stream in (quiet, loud):
        with Progress(100, 20, stream) as progress:
            progress.advance(28, 2)
    assert quiet.getvalue() == ""
    assert " 50/100 " in loud.getvalue()
    assert loud.getvalue().endswith("\r\x1b[K")
    assert progress.line(10) == "[############            ]  50%  50/100  3/s  0:17 left  2 unreadable"
    assert Progress(7200, 0, quiet).line(1).endswith("0/7,200  0/s  --:-- left")
    slow = Progress(7201, 0, quiet)
    slow.advance(1)
    assert slow.line(1).endswith("1/s  2:00:00 left")
