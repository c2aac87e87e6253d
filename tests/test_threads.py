"""A server keeps to the processors that it may use: how many threads of its own there are, as docs/serving.md says."""

import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from test_server_inference import request, rows_for
from test_server_process import READY, Process, serving

from layercast.proto.rpc import INFERENCE

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")

_MOST = 32  # too large a message for the event loop to read
_OPTIONS = (
    "--grpc-port", "0", "--http-port", "0", "--metrics-port", "0", "--device", "cpu", "--max-batch", str(_MOST)
)  # fmt: skip
_OF_GRPC = re.compile(r"event_engine|grpc_global_tim|lifeguard|timer_manager")
_DOCS = Path(__file__).parents[1] / "docs" / "serving.md"


def documented(processors: int, instances: int) -> int:
    """Return what docs/serving.md says is the most."""
    (formula,) = re.findall(r"at most\s+`(\d+) \+ (\d+) × T \+ M × \(2 × T − 1\)`\s+threads", _DOCS.read_text())
    own, each = map(int, formula)
    return own + each * processors + instances * (2 * processors - 1)


@contextmanager
def server(repository: Path, cache: Path, processors: int, *options: str, patch: str = "") -> Iterator[Process]:
    allowed = sorted(os.sched_getaffinity(0))[:processors]
    confined = f"import os; os.sched_setaffinity(0, {allowed})\n"
    options = ("--cache", str(cache), *_OPTIONS, *options)
    with serving(repository, *options, patch=confined + patch) as process:
        yield process


def ask(process: Process) -> None:
    """Have the model computed in every way that starts threads: predictions of some sizes, and a layer."""
    port = process.read_until(READY).group(1)
    method = INFERENCE["ModelInfer"]
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        infer = channel.unary_unary(method.path, method.request.SerializeToString, method.response.FromString)
        for rows, outputs in ((1, ()), (_MOST, ()), (8, ("layer:stem",))):
            calls = [infer.future(request("resnet", rows_for("resnet", rows), outputs), timeout=60) for _ in range(3)]
            assert all(call.result().outputs for call in calls)


def threads(process: Process) -> list[str]:
    """Return the names of the process's threads, but for gRPC's own, which count the machine's processors."""
    names = [path.read_text().strip() for path in Path(f"/proc/{process.popen.pid}/task").glob("*/comm")]
    return [name for name in names if not _OF_GRPC.match(name)]


@pytest.fixture(scope="module")
def one(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of the model resnet alone."""
    root = tmp_path_factory.mktemp("one")
    shutil.copytree(repository / "resnet", root / "resnet")
    return root


@pytest.mark.parametrize("processors", [1, 2])
def test_a_server_has_no_more_threads_than_documented(one, tmp_path, processors):
    if len(os.sched_getaffinity(0)) < processors:
        pytest.skip(f"needs {processors} processors")
    with server(one, tmp_path, processors) as process:
        ask(process)
        found = threads(process)
        assert 3 <= len(found) <= documented(processors, 1), found


def test_one_that_ignored_its_processors_would_have_more(one, tmp_path):
    sixteen = "from layercast.server import environment; environment.cpu_budget = lambda: 16\n"
    with server(one, tmp_path, 1, "--engine", "eager", patch=sixteen) as process:
        ask(process)
        assert len(threads(process)) > documented(1, 1)


def test_idle_threads_of_torch_sleep_unless_the_operator_wants_otherwise(monkeypatch):
    from layercast.server import environment

    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setenv("KMP_BLOCKTIME", "200")
    environment.let_idle_threads_sleep()
    assert (os.environ["OMP_WAIT_POLICY"], os.environ["KMP_BLOCKTIME"]) == ("PASSIVE", "200")
