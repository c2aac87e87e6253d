"""A directory's rows in one file: order, formats, what is refused, what is left out."""

import io
import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from catalogue import arguments, check, expected

from layercast.client.embedding import parts as parts_module
from layercast.client.progress import Progress
from layercast.proto.messages import ExtractRequest

image_module = pytest.importorskip("PIL.Image", reason="Pillow comes with the images extra")

Run = Callable[..., tuple[int, str, str]]


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
        (
            ["gallery", "{}", "--layer", "*", "--output", "x.npz"],
            1,
            "selects 2 layers (net.0, net.1); name one of them",
        ),
        (["pair", "{}", "--layer", "x", "--output", "out.npz"], 1, "model 'pair' has the inputs a, b"),
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
