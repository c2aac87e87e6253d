"""Kernels in C++: the libraries that are made, which of them a processor gets, and what is said where there are none."""

import ctypes
import stat
from pathlib import Path

import compiled_kernels
import pytest

from layercast.server import compiled, kernels

AVX2 = frozenset({"avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "sse2"})
AVX512 = AVX2 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
NAMES = ("winograd", "encoder")
needs_compiler = pytest.mark.skipif(bool(kernels.missing()), reason=f"can't be compiled here: {kernels.missing()}")


def pretend(folder: Path, *levels: str) -> Path:
    folder.mkdir(parents=True)
    for name in kernels.SOURCES:
        for level in levels:
            (folder / f"{name}-{level}.so").write_bytes(b"not a library")
    return folder


def has(monkeypatch: pytest.MonkeyPatch, instructions: frozenset[str]) -> None:
    monkeypatch.setattr(kernels, "instructions", lambda: instructions)


@pytest.fixture
def looked_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put back where this process looks for code."""
    monkeypatch.setattr(compiled, "_looked_in", [])


@pytest.mark.usefixtures("looked_in")
def test_a_library_is_made_for_each_level_and_found(tmp_path: Path) -> None:
    compiled_kernels.make(tmp_path)
    assert [compiled.kernel(name) for name in NAMES] == [None, None], "nobody said where to look"
    compiled.look_in(tmp_path)
    folder = tmp_path / compiled.made_of() / "kernels"
    assert {path.name for path in folder.iterdir()} == {
        f"{name}-{level}.so" for name in NAMES for level in ("v4", "v3")
    }
    assert kernels.are_whole(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755
    for name in NAMES:
        found = compiled.kernel(name)
        assert found is not None
        assert (found.parent, found.name[: len(name)]) == (folder, name)
        ctypes.CDLL(str(found))
    compiled.look_in(tmp_path / "absent")
    assert [compiled.kernel(name) for name in NAMES] == [None, None]


@pytest.mark.usefixtures("looked_in")
def test_code_that_can_not_be_read_is_left_alone(tmp_path, monkeypatch, caplog) -> None:
    def unreadable() -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(compiled, "made_of", unreadable)
    compiled.look_in(tmp_path)
    assert compiled.kernel("winograd") is None
    assert "compiled code can't be read, the sources run: Permission denied" in caplog.text


@pytest.mark.parametrize(
    ("instructions", "level"),
    [(AVX512, "v4"), (AVX512 - {"avx512vl"}, "v3"), (AVX2, "v3"), (AVX2 - {"fma"}, ""), (frozenset(), "")],
)
def test_a_processor_gets_the_best_that_it_can_run(tmp_path, monkeypatch, instructions, level) -> None:
    has(monkeypatch, instructions)
    folder = pretend(tmp_path / "kernels", "v4", "v3")
    for name in NAMES:
        found = kernels.best(folder, name)
        assert (found.name if found else "") == (f"{name}-{level}.so" if level else "")
        reason = "" if level else "this processor has neither AVX-512 nor AVX2"
        assert kernels.why_none(folder, name) == reason


def test_what_is_not_there_is_not_found(tmp_path, monkeypatch) -> None:
    has(monkeypatch, AVX512)
    folder = pretend(tmp_path / "kernels", "v3")
    assert kernels.best(folder, "winograd") == folder / "winograd-v3.so"
    assert not kernels.are_whole(folder)
    assert kernels.are_whole(pretend(tmp_path / "whole", "v4", "v3"))
    (tmp_path / "whole" / "encoder-v3.so").unlink()
    assert not kernels.are_whole(tmp_path / "whole")
    assert kernels.best(tmp_path / "absent", "winograd") is None
    monkeypatch.setattr(kernels, "missing", lambda: "")
    assert kernels.why_none(tmp_path / "absent", "winograd") == "`layercast compile` makes its kernel"


def test_without_a_compiler_or_on_another_processor_it_says_so(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(kernels.platform, "machine", lambda: "x86_64")
    monkeypatch.setenv("CXX", "no-such-compiler -O1")
    reason = "it needs the C++ compiler 'no-such-compiler -O1': apt install g++, or name yours in CXX"
    assert kernels.make(tmp_path / "kernels") == reason
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert kernels.missing() == "it needs the C++ compiler 'c++': apt install g++, or name yours in CXX"
    monkeypatch.setattr(kernels.platform, "machine", lambda: "aarch64")
    assert kernels.make(tmp_path / "kernels") == "it is for processors of the kind x86-64, not aarch64"
    assert list(tmp_path.iterdir()) == []


@needs_compiler
def test_a_compiler_that_fails_leaves_nothing_and_its_error_is_told(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("CXX", "false")
    assert kernels.make(tmp_path / "kernels") == "the C++ compiler failed: no output"
    monkeypatch.delenv("CXX")
    (tmp_path / "wrong.cpp").write_text("int main() {\n  return nothing_of_this_name;\n}\n")
    monkeypatch.setattr(kernels, "SOURCES", {"winograd": str(tmp_path / "wrong.cpp")})
    reason = kernels.make(tmp_path / "kernels")
    assert "error" in reason
    assert "nothing_of_this_name" in reason
    assert "\n" not in reason
    (tmp_path / "program").write_text("no program")
    (tmp_path / "program").chmod(0o755)
    monkeypatch.setenv("CXX", str(tmp_path / "program"))
    assert kernels.make(tmp_path / "kernels") == "the C++ compiler failed: Exec format error"
    assert not (tmp_path / "kernels").exists()
