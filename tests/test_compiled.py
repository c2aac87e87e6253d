"""The hot path as native code: it answers as the sources do, is used just where it is current, and nothing depends on it."""

import fcntl
import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import pytest
from module_runs import TESTS, Results, run_modules
from test_server_inference import offline, request, rows_for, values_of
from test_server_process import READY, infer, serving

from layercast.client.main import main
from layercast.server import compiled, kernels
from layercast.server.commands import compile

LEVEL = os.environ.get("MYPYC_OPT_LEVEL", "0")
"""What the C compiler optimises: nothing, which is most of its work, unless said otherwise. The code does the same."""
FOLDER = TESTS.parent / "build" / f"compiled-for-tests-{LEVEL}"
"""Kept from run to run: what is compiled there is named after the sources."""
MODULES = (
    "test_bad_requests", "test_batcher_endings", "test_direct_streams", "test_reload", "test_server_inference",
    "test_short", "test_stream", "test_wire",
)  # fmt: skip

CANCELLING = """
import asyncio, sys, threading
from pathlib import Path
from layercast.server import compiled
assert compiled.use(Path(sys.argv[1]))
from layercast.server.service.answering import off_loop
async def main():
    leave = threading.Event()
    call = asyncio.create_task(off_loop(1 << 40, leave.wait))
    await asyncio.sleep(0)  # it is in the thread now
    call.cancel()
    try:
        await call
    except asyncio.CancelledError:
        print("cancelled" if compiled.in_use() else "the sources run")
    finally:
        leave.set()
asyncio.run(main())
"""


@pytest.fixture(scope="module", autouse=True)
def quickly() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MYPYC_OPT_LEVEL", LEVEL)
        yield


@pytest.fixture
def kernels_quickly(monkeypatch) -> None:
    """Optimise no kernels either, where nobody runs them."""
    monkeypatch.setattr(kernels, "_FLAGS", ("-O0", *kernels._FLAGS[1:]))


@pytest.fixture(scope="module")
def folder(quickly) -> Path:
    assert main(["compile", "--output", str(FOLDER)]) == 0
    (root,) = FOLDER.glob(compiled.made_of())
    assert kernels.are_whole(root / "kernels") or kernels.missing()
    return FOLDER


@pytest.fixture(scope="module")
def results(folder, tmp_path_factory) -> Results:
    report = tmp_path_factory.mktemp("compiled") / "report.xml"
    command = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "use_compiled")
    path = os.pathsep.join(filter(None, (str(TESTS), os.environ.get("PYTHONPATH"))))
    return run_modules(command, report, {"LAYERCAST_TEST_COMPILED": str(folder), "PYTHONPATH": path}, MODULES)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("module", MODULES)
def test_the_module_passes_with_compiled_code(results, module):
    results.assert_passed(module)


def test_nothing_fails_there_beside_the_tests(results):
    results.assert_nothing_else_failed()


def test_a_server_uses_it_and_says_so(folder, only_mnist, modules):
    with serving(only_mnist, "--compiled", str(folder)) as server:
        ready = server.read_until(READY)
        assert any(line.endswith("; compiled") for line in server.lines)
        rows = rows_for("mnist", 5)
        answer = infer(ready[1], request("mnist", rows))
        np.testing.assert_allclose(values_of(answer), offline(modules["mnist"], rows), rtol=1e-4, atol=1e-5)


def test_where_warnings_are_errors_a_cancelled_call_is_cancelled(folder):
    old = "the (type, exc, tb) signature of throw() is deprecated"  # since Python 3.12
    command = [sys.executable, "-W", f"error:{old}:DeprecationWarning", "-c", CANCELLING, folder]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.stdout == "cancelled\n"


def test_without_current_code_the_sources_run(tmp_path):
    assert not compiled.use(tmp_path / "absent")
    (tmp_path / "of other sources").mkdir()
    before = list(sys.path)
    assert not compiled.use(tmp_path)
    assert sys.path == before
    assert not compiled.in_use()


def test_modules_that_are_imported_already_are_not_replaced(tmp_path):
    import layercast.server.work  # noqa: F401

    pretend(tmp_path / compiled.made_of())
    with pytest.raises(RuntimeError, match="imported before"):
        compiled.use(tmp_path)


def pretend(root: Path) -> None:
    """Make a folder that has the files of compiled modules and kernels, none of which can be loaded."""
    made = (f"kernels/{name}-{level}.so" for name in kernels.SOURCES for level in kernels.LEVELS)
    for name in (
        "library/abc__mypyc.so",
        *made,
        *(f"layercast/{name.replace('.', '/')}.so" for name in compiled.MODULES),
    ):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"not a library")


def test_code_that_is_not_all_there_is_not_used(tmp_path):
    root = tmp_path / compiled.made_of()
    pretend(root)
    assert compiled.is_whole(root)
    (root / "layercast" / "server" / "work.so").unlink()
    assert not compiled.is_whole(root)
    assert not compiled.use(tmp_path)


def test_code_that_can_not_be_loaded_is_left_alone(one_model, tmp_path):
    root = tmp_path / compiled.made_of()
    pretend(root)
    (root / "library" / "abc__mypyc.so").rename(
        root / "library" / f"abc__mypyc{sysconfig.get_config_var('EXT_SUFFIX')}"
    )
    with serving(one_model, "--compiled", str(tmp_path)) as server:
        server.read_until(READY)
        output = "\n".join(server.lines)
    assert "compiled code can't be loaded, the sources run: " in output
    assert str(tmp_path) not in output
    assert "; compiled" not in output


def test_other_sources_have_another_name(tmp_path, monkeypatch):
    for package in compiled.PACKAGES:
        (tmp_path / package).mkdir()
        (tmp_path / package / "one.py").write_text("A = 1\n")
    monkeypatch.setattr(compiled, "source_of", lambda package: tmp_path / package)
    names = {compiled.made_of()}
    (tmp_path / "server" / "one.py").write_text("A = 2\n")
    names.add(compiled.made_of())
    (tmp_path / "server" / "one.py").rename(tmp_path / "server" / "two.py")
    names.add(compiled.made_of())
    (tmp_path / "proto" / "one.pyi").write_text("A: int\n")
    names.add(compiled.made_of())
    assert len(names) == 4
    (tmp_path / "server" / "kernel.cpp").write_text("int a = 1;\n")
    names.add(compiled.made_of())
    (tmp_path / "server" / "kernel.cpp").write_text("int a = 2;\n")
    names.add(compiled.made_of())
    assert len(names) == 6
    (tmp_path / "proto" / "notes.txt").write_text("nothing that is compiled")
    assert compiled.made_of() in names


def test_without_a_compiler_it_says_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CC", "no-such-compiler")
    assert main(["compile", "--output", str(tmp_path / "out")]) == 1
    assert "layercast compile: this needs the C compiler 'no-such-compiler': apt install gcc" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_where_nothing_can_be_written_it_says_what_to_do(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["compile", "--output", str(tmp_path / "file")]) == 1
    assert "name another with --output" in capsys.readouterr().err


def test_a_compiler_that_fails_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compiled, "MODULES", ("server.text",))
    monkeypatch.setenv("CC", "false")
    assert main(["compile", "--output", str(tmp_path)]) == 1
    assert "the compiler failed, and the server runs without" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_a_killed_one_left_goes(tmp_path, monkeypatch):
    monkeypatch.setattr(compiled, "MODULES", ("server.text",))
    monkeypatch.setenv("CC", "false")
    (tmp_path / ".compiling-abc" / "layercast").mkdir(parents=True)
    (tmp_path / ".hidden").mkdir()
    assert main(["compile", "--output", str(tmp_path)]) == 1
    assert list(tmp_path.iterdir()) == [tmp_path / ".hidden"]


def test_another_one_at_work_is_waited_for_and_its_folder_left_alone(tmp_path):
    handle = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    (tmp_path / ".compiling-abc").mkdir()
    command = [sys.executable, "-m", "layercast.server", "compile", "--output", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with process:
        assert process.stderr.readline() == f"waiting for another `layercast compile` in {tmp_path}\n"
        assert list(tmp_path.iterdir()) == [tmp_path / ".compiling-abc"]
        pretend(tmp_path / compiled.made_of())
        (tmp_path / compiled.made_of() / f"mypy-{version('mypy')}").touch()
        os.close(handle)
        assert process.stdout.read() == f"already compiled: {tmp_path / compiled.made_of()}\n"
    assert process.returncode == 0


def test_what_another_mypy_made_is_made_again_and_what_is_of_other_sources_goes(
    tmp_path, kernels_quickly, monkeypatch, capsys
):
    monkeypatch.setattr(compiled, "MODULES", ("server.text", "server.inline"))
    root = tmp_path / compiled.made_of()
    pretend(root)
    (root / "mypy-2.3.9").touch()
    pretend(tmp_path / ("0" * 24))
    others = [tmp_path / "of somebody else", tmp_path / ("1" * 24)]
    for other in others:
        other.mkdir()
    (tmp_path / ("2" * 24) / "library").mkdir(parents=True)  # half of it, of a removal that was cut off
    assert main(["compile", "--output", str(tmp_path)]) == 0
    assert "compiled 2 modules" in capsys.readouterr().out
    made = {"layercast", "library", f"mypy-{version('mypy')}", *([] if kernels.missing() else ["kernels"])}
    assert {path.name for path in root.iterdir()} == made
    assert [path.suffix for path in root.glob("layercast/server/text.*")] == [".so"]
    assert set(tmp_path.iterdir()) == {root, *others}
    assert main(["compile", "--output", str(tmp_path)]) == 0
    assert "already compiled" in capsys.readouterr().out
    monkeypatch.setattr(compile, "version", no_such_package)
    assert main(["compile", "--output", str(tmp_path)]) == 0
    assert "already compiled" in capsys.readouterr().out


def no_such_package(name: str) -> str:
    raise PackageNotFoundError(name)


@pytest.mark.skipif(bool(kernels.missing()), reason=f"no kernels can be compiled here: {kernels.missing()}")
def test_without_a_cpp_compiler_it_goes_on_and_a_later_one_makes_the_kernels_alone(
    tmp_path, kernels_quickly, monkeypatch, capsys
):
    monkeypatch.setattr(compiled, "MODULES", ("server.text", "server.inline"))
    root, without = tmp_path / compiled.made_of(), "layercast compile: without engine winograd, encoder: "
    monkeypatch.setenv("CXX", "no-such-compiler")
    for said in ("compiled 2 modules", "already compiled"):
        assert main(["compile", "--output", str(tmp_path)]) == 0
        output = capsys.readouterr()
        assert output.err.startswith(f"{without}it needs the C++ compiler 'no-such-compiler'")
        assert said in output.out
        assert not (root / "kernels").exists()
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*.so")}
    monkeypatch.setenv("CXX", "false")
    assert main(["compile", "--output", str(tmp_path)]) == 0
    assert capsys.readouterr().err == f"{without}the C++ compiler failed: no output\n"
    monkeypatch.delenv("CXX")
    (root / "kernels").mkdir()  # half of them, of a removal that was cut off
    assert main(["compile", "--output", str(tmp_path)]) == 0
    assert capsys.readouterr() == (f"compiled the kernels of engine winograd, encoder: {root / 'kernels'}\n", "")
    assert kernels.are_whole(root / "kernels")
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert list(tmp_path.iterdir()) == [root]
    assert main(["compile", "--output", str(tmp_path)]) == 0
    assert capsys.readouterr() == (f"already compiled: {root}\n", "")
