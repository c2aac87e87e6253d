"""What the image promises, without an engine: the Dockerfile's own commands as process 1 of an unprivileged user, with
no writable file system and no network but its own loopback. Namespaces do for a container; root must make them.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

Answer = TypeVar("Answer")
ROOT = Path(__file__).parent.parent
COMMAND = Path(sys.executable).with_name("layercast")
TOOLS = ("unshare", "setpriv", "nsenter", "ip")
USER = "10001"
NAMESPACES = ["--mount", "--propagation", "private", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
# The files of this checkout may be for root's eyes only, which those of an image are not: one right to read is kept.
SEAL = """
for mount in $(awk '$3 ~ /^(ext4|xfs|btrfs|overlay|tmpfs)$/ {print $2}' /proc/mounts); do
    mount -o remount,bind,ro "$mount" 2>/dev/null
done
ip link set lo up
keep=-all,+dac_read_search
exec setpriv --reuid "$0" --regid "$0" --clear-groups --no-new-privs \\
    --inh-caps=$keep --ambient-caps=$keep --bounding-set=$keep "$@"
"""
IMAGE = """
import numpy
from layercast.client import Client
with Client("127.0.0.1:8001") as client:
    print(client.predict("mnist", numpy.zeros((3, 1, 28, 28), numpy.float32)).shape)
"""


def sealed(*command: str | Path) -> list[str | Path]:
    return ["unshare", *NAMESPACES, "sh", "-c", SEAL, USER, *command]


def can_seal() -> bool:
    if os.geteuid() or not all(map(shutil.which, TOOLS)):
        return False
    return subprocess.run(sealed("true"), capture_output=True, check=False).returncode == 0


pytestmark = pytest.mark.skipif(not can_seal(), reason="needs root, util-linux, iproute2 and the right to unshare")


def instruction(name: str) -> list[str]:
    """The exec form of ENTRYPOINT or of HEALTHCHECK's command."""
    lines = (ROOT / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    (line,) = [line for line in lines if line.startswith(name)]
    command: list[str] = json.loads(line[line.index(' ["') :])
    return command


class Container:
    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        self.server = int(wait_for(children.read_text))

    def run(self, *command: str | Path) -> subprocess.CompletedProcess[str]:
        """A command inside the network that only the server's own loopback is on."""
        inside = ["nsenter", "--net", "--target", str(self.server), *command]
        return subprocess.run(inside, capture_output=True, text=True, check=False, timeout=30)

    def is_healthy(self) -> bool:
        assert self.process.poll() is None, self.process.communicate()
        _python, *arguments = instruction("HEALTHCHECK")
        return self.run(sys.executable, *arguments).returncode == 0


def wait_for(probe: Callable[[], Answer], seconds: float = 60) -> Answer:
    deadline = time.monotonic() + seconds
    while not (answer := probe()):
        assert time.monotonic() < deadline, f"{probe} came to nothing in {seconds} s"
        time.sleep(0.05)
    return answer


@pytest.fixture
def container(only_mnist: Path) -> Iterator[Container]:
    _layercast, *arguments = [part.replace("/models", str(only_mnist)) for part in instruction("ENTRYPOINT")]
    command = sealed(COMMAND, *arguments)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            yield Container(process)
        finally:
            process.kill()


def test_the_seal_holds(tmp_path: Path) -> None:
    for folder in (tmp_path, Path("/dev/shm"), ROOT):
        result = subprocess.run(sealed("touch", folder / "file"), capture_output=True, text=True, check=False)
        assert "Read-only file system" in result.stderr
    result = subprocess.run(sealed("sh", "-c", "id -u; echo $$"), capture_output=True, text=True, check=True)
    assert result.stdout == f"{USER}\n1\n"


def test_it_serves_and_stops_like_a_container(container: Container) -> None:
    wait_for(container.is_healthy)
    predicted = container.run(sys.executable, "-c", IMAGE)
    assert predicted.stdout == "(3, 10)\n", predicted.stderr
    os.kill(container.server, signal.SIGTERM)
    output, _ = container.process.communicate(timeout=30)
    assert container.process.returncode == 0, output
