"""Runs the code blocks of a documentation page as its reader would, in order, and holds their output to the page."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from documentation import ROOT, RUN, Block, Page, is_stock
from one_run import cache

from layercast.server.settings import ModelSettings, read

_PARSED = ("toml", "json")
_SHOWN = ("text", "promql", "proto")
_DEFAULT_PORTS = {"8001": "grpc", "8000": "http", "8002": "metrics"}
_ADDRESS = re.compile(r"\b(?:localhost|127\.0\.0\.1):(8000|8001|8002)\b")
_PORT_OPTION = re.compile(r"(--(?:grpc|http|metrics)-port)[ =]\d+")
_SECONDS = 200


@dataclass(frozen=True)
class Surroundings:
    """Where blocks run. `ports` are those of the server in place of the default ones; `stock` has tritonclient."""

    directory: Path
    repository: Path
    ports: dict[str, int]
    stock: str = ""

    def environment(self) -> dict[str, str]:
        """Return the variables of a reader who has just opened a terminal, but for ports, caches, models and instances."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("LAYERCAST_")}
        path = os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", "")])
        own = {"HOME": str(self.directory), "XDG_CACHE_HOME": str(self.directory / ".cache"), "PATH": path}
        free = {f"LAYERCAST_{name.upper()}_PORT": "0" for name in _DEFAULT_PORTS.values()}
        url = {"LAYERCAST_URL": f"127.0.0.1:{self.ports['grpc']}"} if self.ports else {}
        folders = {"LAYERCAST_REPOSITORY": str(self.repository), "LAYERCAST_CACHE": str(cache())}
        # As other servers of the tests have it, so that their choices of engines are remembered.
        alone = {"LAYERCAST_INSTANCES": "1"}
        return {**kept, **own, **free, **url, **folders, **alone}

    def code(self, block: Block) -> str:
        """Return the block's text with the default addresses replaced by those of the server."""
        text = _PORT_OPTION.sub(r"\1 0", block.text)
        if not self.ports:
            return text
        return _ADDRESS.sub(lambda found: f"127.0.0.1:{self.ports[_DEFAULT_PORTS[found[1]]]}", text)


def run(page: Page, around: Surroundings) -> None:
    """Run or check every block of `page` in order. An AssertionError names the block that is not true."""
    shutil.copytree(ROOT / "client" / "samples", around.directory / "client" / "samples")
    with _python(around) as python:
        for block in page.blocks:
            where = f"{page.path.name}:{block.line}"
            known = block.language in (*RUN, *_PARSED, *_SHOWN)
            assert known, f"{where}: no rule for a block of {block.language or 'no language'!r}"
            if block.directive == "not run" or block.language in _SHOWN:
                continue
            if block.language in _PARSED:
                _check_data(block, where)
            if block.directive == "file":
                target = around.directory / block.argument
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(block.text)
            elif block.language in RUN:
                output = _output(block, around, python, page.path, where)
                _compare(block, output, where)


def _check_data(block: Block, where: str) -> None:
    """JSON must parse; TOML must be settings of the server, or of a model when it is a file in a model's folder."""
    try:
        if block.language == "json":
            json.loads(block.text)
            return
        values = tomllib.loads(block.text)
        if "/" in block.argument:
            ModelSettings(**values)
        else:
            read(values)
    except Exception as error:
        raise AssertionError(f"{where}: {error}") from error


def _output(block: Block, around: Surroundings, python: "_Python", path: Path, where: str) -> str:
    code = around.code(block)
    if block.language == "python" and not is_stock(block):
        return python.run(code, path, block.line, where)
    if block.language == "python":
        command = [around.stock, "-W", "ignore", "-c", code]
    else:
        script = code
        if block.language == "console":
            script = "\n".join(line.removeprefix("$ ") for line in code.splitlines() if line.startswith("$ "))
        command = ["bash", "-e", "-o", "pipefail", "-c", script]
    return _process(command, around, block, where)


def _process(command: list[str], around: Surroundings, block: Block, where: str) -> str:
    """Run a command to its end, or interrupt it once its output holds the text that `until` names."""
    until = block.argument if block.directive == "until" else None
    with subprocess.Popen(
        command, cwd=around.directory, env=around.environment(), stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    ) as process:  # fmt: skip
        watch = threading.Timer(_SECONDS, os.killpg, (process.pid, signal.SIGKILL))
        watch.start()
        try:
            assert process.stdout
            lines, seen = [], until is None
            for line in process.stdout:
                lines.append(line)
                if not seen and until is not None and until in line:
                    seen = True
                    os.killpg(process.pid, signal.SIGINT)
            code = process.wait()
        finally:
            watch.cancel()
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    output = "".join(lines)
    assert seen, f"{where}: {until!r} never came:\n{output}"
    assert code == 0, f"{where}: exit code {code}:\n{output}"
    return output


class _Python:
    """One interpreter with warnings as errors, started with the first block, in which all blocks share their names."""

    DRIVER = """
import contextlib, io, json, sys, traceback
names = {"__name__": "__main__"}
for line in sys.stdin:
    code, path, first = json.loads(line)
    output, error = io.StringIO(), ""
    try:
        with contextlib.redirect_stdout(output):
            exec(compile("\\n" * (first - 1) + code, path, "exec"), names)
    except BaseException:
        error = traceback.format_exc()
    print(json.dumps([output.getvalue(), error]), flush=True)
"""

    def __init__(self, around: Surroundings) -> None:
        self._around = around
        self.process: subprocess.Popen[str] | None = None

    def run(self, code: str, path: Path, line: int, where: str) -> str:
        """Return what the block prints."""
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, "-W", "error", "-c", self.DRIVER], cwd=self._around.directory,
                env=self._around.environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps([code, str(path), line]) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, f"{where}: the interpreter ended with {self.process.wait()}"
        output, error = json.loads(answer)
        assert not error, f"{where}: {error}"
        return str(output)


@contextmanager
def _python(around: Surroundings) -> Iterator[_Python]:
    python = _Python(around)
    try:
        yield python
    finally:
        if python.process:
            python.process.communicate(timeout=_SECONDS)


def _compare(block: Block, output: str, where: str) -> None:
    """Hold the output to the page: line by line, any run of blanks alike, `…` or `...` for anything.

    A line of nothing but `…` stands for any number of lines.
    """
    expected = block.expected
    if block.language == "console":
        expected = "\n".join(line for line in block.text.splitlines() if not line.startswith("$ "))
    if not expected:
        return
    parts = []
    for line in expected.strip().splitlines():
        pieces = re.split(r"…|\.\.\.", " ".join(line.split()))
        parts.append(r"(?:.*\n)*?" if pieces == ["", ""] else ".*".join(map(re.escape, pieces)) + r"\n")
    got = "\n".join(" ".join(line.split()) for line in output.strip().splitlines()) + "\n"
    assert re.fullmatch("".join(parts), got), f"{where}: the page says\n{expected}\nbut this came\n{output}"
