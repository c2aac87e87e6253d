"""The Dockerfile: linted by hadolint, and the promises of its comments. Building it needs an engine, tests do not."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from layercast.server import compiled

ROOT = Path(__file__).parent.parent
HADOLINT = Path(sys.executable).with_name("hadolint")
Instruction = tuple[str, str]


def stages() -> list[list[Instruction]]:
    """Instructions of each stage as (name, arguments); continuation lines joined, comments dropped."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    instructions = [tuple(line.split(None, 1)) for line in text.splitlines() if line.strip()]
    starts = [index for index, (name, _) in enumerate(instructions) if name == "FROM"]
    return [instructions[start:end] for start, end in zip(starts, [*starts[1:], None], strict=True)]


def stage(name: str) -> list[Instruction]:
    """The instructions of the stage of this name."""
    (found,) = [stage for stage in stages() if stage[0][1].endswith(f" AS {name}")]
    return found


def last(name: str) -> str:
    """The arguments of the one instruction of this name in the final stage."""
    (arguments,) = [arguments for instruction, arguments in stages()[-1] if instruction == name]
    return arguments


def lint(text: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([HADOLINT, "-"], input=text, capture_output=True, text=True, check=False)


@pytest.mark.skipif(not HADOLINT.exists(), reason="hadolint comes with the extra `dev`")
def test_hadolint_finds_nothing() -> None:
    result = lint((ROOT / "Dockerfile").read_text())
    assert (result.returncode, result.stdout) == (0, "")
    assert lint("FROM debian\nRUN sudo apt-get install python3\nENTRYPOINT layercast").returncode == 1


def test_it_runs_as_a_numbered_user_without_rights() -> None:
    user, group = map(int, last("USER").split(":"))
    assert min(user, group) >= 1000


def test_signals_reach_the_server() -> None:
    assert last("STOPSIGNAL") == "SIGTERM"
    command = json.loads(last("ENTRYPOINT"))  # the shell form is no JSON
    assert command[:2] == ["layercast", "serve"]
    assert "CMD" not in [name for name, _ in stages()[-1]]


def test_it_listens_to_the_outside_and_serves_what_the_build_exported() -> None:
    command = json.loads(last("ENTRYPOINT"))
    options = dict(zip(command[2::2], command[3::2], strict=True))
    assert options == {"--host": "0.0.0.0", "--repository": "/models"}
    assert ("COPY", "--from=export /models /models") in stages()[-1]
    assert any(name == "RUN" and "layercast export --all --output /models" in text for name, text in stage("export"))
    assert last("EXPOSE").split() == ["8000", "8001", "8002"]


def test_the_server_finds_compiled_code_of_its_own_sources_and_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "prefix", "/opt/layercast")
    folder = str(compiled.default_folder())
    final = stages()[-1]
    assert final.index(("COPY", "--from=build /opt/layercast /opt/layercast")) < final.index(
        ("COPY", f"--from=compile {folder} {folder}")
    )
    assert stage("build")[0][1].removesuffix(" AS build") == final[0][1]
    assert stage("compile")[0] == ("FROM", "build AS compile")
    *_, (name, command), (check, text) = stage("compile")
    assert (name, command.endswith("&& layercast compile")) == ("RUN", True)
    assert (check, "are_whole" in text) == ("RUN", True)
    (installed,) = [text for name, text in stage("compile") if name == "RUN" and "apt-get install" in text]
    assert {"gcc", "g++", "libc6-dev"} <= set(installed.split())


@pytest.mark.parametrize("made", [True, False])
def test_an_image_without_the_kernels_that_can_be_made_is_not_built(
    tmp_path: Path, request: pytest.FixtureRequest, made: bool
) -> None:
    *_, (_, text) = stage("compile")
    _, *arguments = json.loads(text)
    folder = tmp_path / "share/layercast/compiled"
    if made:
        shutil.copytree(request.getfixturevalue("kernels_folder"), folder)
    # The modules are taken to be there: to make them takes a minute.
    code = (
        "import sys; sys.prefix = sys.argv[1]; from layercast.server import compiled, kernels; "
        "compiled.is_whole = lambda root: True; kernels.missing = lambda: ''; " + arguments[-1]
    )
    folder.mkdir(parents=True, exist_ok=True)
    result = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0 if made else 1, "")


def test_an_image_without_compiled_code_is_not_built(tmp_path: Path) -> None:
    final = stages()[-1]
    (program, *arguments), *_ = (json.loads(text) for name, text in final if name == "RUN" and text.startswith("["))
    assert program == "python"
    code = "import sys; sys.prefix = sys.argv[1]; " + arguments[-1]
    result = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (1, "")


def test_the_compiler_stays_behind() -> None:
    installing = [text for name, text in stages()[-1] if name == "RUN" and re.search(r"\b(apt|apt-get|pip)\b", text)]
    assert installing == []
    assert [text for name, text in stage("build") if "gcc" in text or "g++" in text or "compile" in text] == []


def test_nothing_is_installed_or_written_by_the_final_stage_after_it_drops_its_rights() -> None:
    names = [name for name, _ in stages()[-1]]
    assert not {"RUN", "COPY", "ADD", "VOLUME"} & set(names[names.index("USER") :])


def test_no_secret_is_baked_in() -> None:
    text = "\n".join(arguments for stage in stages() for name, arguments in stage if name in ("ARG", "ENV"))
    assert not re.search(r"token|secret|password|key", text, re.IGNORECASE)


def test_everything_copied_is_there_and_sent_to_the_engine() -> None:
    patterns = (ROOT / ".dockerignore").read_text().splitlines()
    sent = {line[1:] for line in patterns if line.startswith("!")}
    assert "*" in patterns
    copied = [
        text.split()[:-1] for stage in stages() for name, text in stage if name == "COPY" and "--from" not in text
    ]
    for source in (Path(source) for sources in copied for source in sources):
        assert (ROOT / source).exists(), source
        assert source.parts[0] in sent, source


@pytest.fixture
def health_server() -> Iterator[tuple[int, health.HealthServicer]]:
    server = grpc.server(ThreadPoolExecutor(2))
    servicer = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield port, servicer
    server.stop(0).wait()


def check_health(port: int) -> int:
    options, command = last("HEALTHCHECK").split("CMD", 1)
    (timeout,) = re.findall(r"--timeout=(\d+)s", options)
    program, *arguments = json.loads(command)
    assert program == "python"
    arguments = [argument.replace(":8001", f":{port}") for argument in arguments]
    result = subprocess.run([sys.executable, *arguments], capture_output=True, timeout=int(timeout), check=False)
    return result.returncode


def test_the_health_check_follows_the_health_service(health_server: tuple[int, health.HealthServicer]) -> None:
    port, servicer = health_server
    servicer.set("", health_pb2.HealthCheckResponse.SERVING)
    assert check_health(port) == 0
    servicer.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
    assert check_health(port) == 1


def test_the_health_check_fails_where_nothing_listens() -> None:
    assert check_health(1) == 1
