"""The server as a process: what it prints, how it stops, what a second one on its ports is told."""

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import hosting
import numpy as np
import pytest
from one_run import cache
from test_server_inference import offline, request, rows_for, values_of

from layercast.proto.messages import ModelInferRequest, ModelInferResponse
from layercast.proto.rpc import INFERENCE

READY = re.compile(
    r"ready in [\d.]+ s   gRPC 127\.0\.0\.1:(\d+)   http://127\.0\.0\.1:(\d+)   metrics http://127\.0\.0\.1:(\d+)"
)


class Process:
    """A `layercast serve` whose output is read line by line."""

    def __init__(self, popen: "subprocess.Popen[str]") -> None:
        self.popen = popen
        self.lines: list[str] = []

    def read_until(self, pattern: str | re.Pattern[str]) -> re.Match[str]:
        """Return the match of the first line that fits; fails when the output ends before."""
        assert self.popen.stdout
        for line in self.popen.stdout:
            self.lines.append(line.rstrip("\n"))
            if found := re.search(pattern, line):
                return found
        raise AssertionError("the server ended: " + "\n".join(self.lines))

    def rest(self) -> str:
        """Wait for the end and return what was printed since."""
        output, _ = self.popen.communicate(timeout=60)
        return output


RUN = "import sys; from layercast.client.main import main; sys.exit(main(sys.argv[1:]))"


@contextmanager
def serving(repository: Path | None, *options: str, patch: str = "", seconds: float = 120) -> Iterator[Process]:
    """Run the server, so long at most; `patch` is Python that is run before, to make a model or a load slow."""
    program = ["-c", patch + RUN] if patch and not hosting.envoy else ["-m", "layercast.server"]
    command = [sys.executable, *program, "serve", "--front-end", hosting.front_end_name(), *options]
    if repository:
        command += ["--repository", str(repository)]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("LAYERCAST_")}
    environment["LAYERCAST_CACHE"] = str(cache())
    if patch and hosting.envoy:
        environment["PYTHONPATH"] = os.pathsep.join([in_every_python(patch), environment.get("PYTHONPATH", "")])
    popen = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    watchdog = threading.Timer(seconds, popen.kill)
    watchdog.start()
    try:
        yield Process(popen)
    finally:
        watchdog.cancel()
        popen.kill()
        popen.communicate()


def in_every_python(script: str) -> str:
    """Return a folder that, first in PYTHONPATH, lets `script` run at each start: the process gets a second Python."""
    folder = Path(tempfile.mkdtemp())
    (folder / "sitecustomize.py").write_text(script)
    return str(folder)


FREE = ("--grpc-port", "0", "--http-port", "0", "--metrics-port", "0", "--engine", "eager")


def infer(port: str, message: ModelInferRequest) -> ModelInferResponse:
    method = INFERENCE["ModelInfer"]
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.unary_unary(method.path, method.request.SerializeToString, method.response.FromString)
        answer: ModelInferResponse = call(message, timeout=30)
        return answer


def test_it_says_what_it_serves_answers_and_stops_on_sigterm(repository, modules):
    with serving(repository, *FREE) as server:
        ports = server.read_until(READY)
        text = "\n".join(server.lines)
        assert re.search(r"layercast \S+  python 3\.\d+\.\d+  torch \S+  onnxruntime \S+  \(.+\)", text)
        assert re.search(r"MODEL +VER +ENGINE +DEVICE +INPUT +OUTPUT +BATCH +LAYERS +WARM-UP", text)
        assert re.search(r"mnist +1 +eager +(cpu|cuda) +image f32\[N,1,28,28\] +logits f32\[N,10\] +128/0ms +13 ", text)
        assert re.search(r"transformer +1 .* tokens i64\[N,T<=32\]", text)
        x = rows_for("mnist", 3)
        np.testing.assert_allclose(
            values_of(infer(ports[1], request("mnist", x))), offline(modules["mnist"], x), atol=1e-4
        )
        server.popen.send_signal(signal.SIGTERM)
        assert "stopped" in server.rest()
        assert server.popen.returncode == 0


def test_ctrl_c_drains_what_waits_and_exits_zero(one_model, modules):
    """A delay longer than the test keeps the rows in the queue; the drain answers them instead of waiting."""
    with serving(one_model, *FREE, "--max-delay-ms", "9000") as server:
        ports = server.read_until(READY)
        x = rows_for("shared", 2)
        method = INFERENCE["ModelInfer"]
        with grpc.insecure_channel(f"127.0.0.1:{ports[1]}") as channel:
            call = channel.unary_unary(method.path, method.request.SerializeToString, method.response.FromString)
            waiting = [call.future(request("shared", x), timeout=60) for _ in range(3)]
            wait_for_queue(ports[3], 6)
            server.popen.send_signal(signal.SIGINT)
            for answer in waiting:
                np.testing.assert_allclose(values_of(answer.result()), offline(modules["shared"], x), atol=1e-5)
        assert server.popen.wait(60) == 0


def wait_for_queue(port: str, rows: int) -> None:
    end = time.monotonic() + 20
    while time.monotonic() < end:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as response:
            if f'layercast_queue_rows{{model="shared",version="1"}} {rows}.0' in response.read().decode():
                return
    raise AssertionError(f"{rows} rows never waited")


@pytest.mark.parametrize("option", ["--grpc-port", "--http-port", "--metrics-port"])
def test_a_port_in_use_is_one_clear_line(one_model, option):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with serving(one_model, *FREE, option, str(port)) as server:
            server.read_until(rf"layercast serve: .*port {port} on 127\.0\.0\.1 is in use.*{option}")
            assert "Traceback" not in server.rest()
            assert server.popen.returncode == 1
            assert not [line for line in server.lines if "add_port" in line]


def test_a_second_server_on_the_ports_of_a_running_one_is_refused_and_the_first_goes_on(one_model, modules):
    with serving(one_model, *FREE) as first:
        ports = first.read_until(READY)
        with serving(one_model, "--grpc-port", ports[1], "--http-port", "0", "--metrics-port", "0") as second:
            second.read_until("is in use")
            second.rest()
            assert second.popen.returncode == 1
        x = rows_for("shared", 1)
        np.testing.assert_allclose(
            values_of(infer(ports[1], request("shared", x))), offline(modules["shared"], x), atol=1e-5
        )


def run(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "layercast.server", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, **environment})


def test_wrong_options_are_told_and_exit_with_two_or_one():
    assert run("serve", "--no-such-option").returncode == 2
    wrong = run("serve", "--max-batch", "zero")
    assert wrong.returncode == 1
    assert wrong.stderr.strip().startswith("layercast serve: max_batch: ")
    assert "Traceback" not in wrong.stderr
    missing = run("serve", "--repository", "/nonexistent", *FREE)
    assert missing.returncode == 1
    assert "is not a folder" in missing.stderr


def test_a_protobuf_that_hostile_messages_can_bring_down_stops_the_start(one_model):
    refused = run("serve", "--repository", str(one_model), *FREE, PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION="python")
    assert refused.returncode == 1
    assert "protobuf runs on its 'python' implementation" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_help_lists_every_setting_and_loads_no_torch():
    script = """
import sys
from layercast.client.main import main
try:
    main(["serve", "--help"])
except SystemExit:
    pass
assert "torch" not in sys.modules
"""
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert shown.returncode == 0, shown.stderr
    for option in (
        "--repository",
        "--grpc-port",
        "--max-batch",
        "--max-delay-ms",
        "--engine",
        "--device",
        "--no-reflection",
    ):
        assert option in shown.stdout
