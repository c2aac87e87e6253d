"""What is left when a run ends early, and what the next one makes of it."""

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
from catalogue import FILES, arguments, check

from layercast.client.embedding import parts as parts_module
from layercast.client.embedding.asking import Asker
from layercast.client.embedding.listing import Entry
from layercast.client.embedding.parts import Parts
from layercast.client.errors import InputError
from layercast.proto.messages import ExtractRequest

image_module = pytest.importorskip("PIL.Image", reason="Pillow comes with the images extra")

Run = Callable[..., tuple[int, str, str]]


def rows_asked(server: Any) -> int:
    return sum(request.inputs[0].shape[0] for request in server.asked(ExtractRequest))


def test_a_run_that_was_interrupted_goes_on_where_it_was(
    run: Run, server: Any, catalogue: Path, tmp_path: Path
) -> None:
    whole, output = tmp_path / "whole.npz", tmp_path / "out.npz"
    assert run(*arguments(catalogue, whole))[0] == 0
    asked = {request.SerializeToString() for request in server.asked(ExtractRequest)}
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
    # Grouped as in a run that nothing disturbed, so that a model computes the same.
    assert {request.SerializeToString() for request in server.asked(ExtractRequest)} < asked
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
    cut = folder / "000001.npz"
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    (folder / "mine.npz").write_bytes(b"somebody else's")
    server.requests.clear()
    assert run(*arguments(catalogue, output))[0] == 0
    assert rows_asked(server) == FILES - 8
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


def test_answers_of_two_forms_to_the_files_of_one_request_are_refused(tmp_path: Path) -> None:
    asker = Asker(None, None, "", "layer", tmp_path, 1)  # type: ignore[arg-type]
    entries = [Entry(name, 1, 1) for name in "abc"]
    answers = [np.zeros((2, 3), "f4"), np.zeros((1, 4), "f4")]
    with pytest.raises(InputError, match=r"c gives \[4\] of float32, .*reduce the layer to one size"):
        asker._joined(entries, answers)


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
