import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

from layercast.server import environment

GIB = 2**30


@pytest.fixture
def many_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(16)))


def machine(root: Path, cgroup: str, files: dict[str, str]) -> Path:
    for name, text in {"proc/self/cgroup": cgroup, **{f"sys/fs/cgroup/{k}": v for k, v in files.items()}}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


V1 = "4:memory:/\n2:cpu,cpuacct:/docker/abc\n"


@pytest.mark.usefixtures("many_processors")
@pytest.mark.parametrize(
    ("cgroup", "files", "budget"),
    [
        pytest.param("0::/\n", {}, 16, id="v2-no-quota-file"),
        pytest.param("0::/\n", {"cpu.max": "max 100000\n"}, 16, id="v2-max"),
        pytest.param("0::/\n", {"cpu.max": "400000 100000\n"}, 4, id="v2"),
        pytest.param("0::/\n", {"cpu.max": "50000 100000\n"}, 1, id="v2-half-a-processor"),
        pytest.param("0::/\n", {"cpu.max": "150000 100000\n"}, 1, id="v2-rounds-down"),
        pytest.param("0::/pod/box\n", {"pod/cpu.max": "300000 100000\n"}, 3, id="v2-set-on-the-parent"),
        pytest.param(
            "0::/pod/box\n",
            {"pod/cpu.max": "300000 100000\n", "pod/box/cpu.max": "200000 100000\n"},
            2,
            id="v2-the-tightest",
        ),
        pytest.param("0::/host/only\n", {"cpu.max": "200000 100000\n"}, 2, id="v2-path-of-the-host"),
        pytest.param(
            V1, {"cpu,cpuacct/cpu.cfs_quota_us": "250000\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n"}, 2, id="v1"
        ),
        pytest.param(
            V1, {"cpu/docker/abc/cpu.cfs_quota_us": "-1\n", "cpu/docker/abc/cpu.cfs_period_us": "100000\n"}, 16,
            id="v1-no-quota",
        ),
        pytest.param(V1, {"cpu/cpu.cfs_quota_us": "0\n", "cpu/cpu.cfs_period_us": "0\n"}, 16, id="v1-zero-period"),
        pytest.param("0::/\n", {"cpu.max": "nonsense"}, 16, id="unreadable"),
    ],
)  # fmt: skip
def test_cpu_budget_is_capped_by_the_quota(tmp_path: Path, cgroup: str, files: dict[str, str], budget: int) -> None:
    assert environment.cpu_budget(machine(tmp_path, cgroup, files)) == budget


def test_cpu_budget_never_exceeds_the_affinity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {3})
    assert environment.cpu_budget(machine(tmp_path, "0::/\n", {"cpu.max": "800000 100000"})) == 1


@pytest.mark.usefixtures("many_processors")
def test_cpu_budget_without_cgroups(tmp_path: Path) -> None:
    assert environment.cpu_budget(tmp_path) == 16


def test_cpu_budget_here_follows_a_narrower_affinity() -> None:
    one = min(os.sched_getaffinity(0))
    code = f"import os; os.sched_setaffinity(0, {{{one}}}); from layercast.server.environment import cpu_budget as c"
    result = subprocess.run([sys.executable, "-c", f"{code}; print(c())"], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "1"


def test_versions_are_those_installed() -> None:
    versions = environment.versions()
    assert list(versions)[:2] == ["layercast", "python"]
    assert versions["torch"] == metadata.version("torch")
    assert versions["onnxruntime"].count(".") == 2


def test_versions_leave_out_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "version", missing)
    assert list(environment.versions()) == ["python"]


def missing(package: str) -> str:
    raise metadata.PackageNotFoundError(package)


@pytest.mark.parametrize(
    ("installed", "clashes"),
    [
        ({"onnxruntime-gpu"}, False),
        ({"onnxruntime"}, False),
        (set(), False),
        ({"onnxruntime", "onnxruntime-gpu"}, True),
    ],
)
def test_onnxruntime_clash(monkeypatch: pytest.MonkeyPatch, installed: set[str], clashes: bool) -> None:
    monkeypatch.setattr(environment, "version", lambda package: "1.31.1" if package in installed else missing(package))
    problem = environment.onnxruntime_clash()
    assert (problem is not None) is clashes
    if problem:
        assert "pip uninstall -y onnxruntime-gpu onnxruntime && pip install onnxruntime-gpu" in problem


def test_two_onnxruntimes_in_a_real_folder_clash(tmp_path: Path) -> None:
    for package in ("onnxruntime", "onnxruntime-gpu"):
        folder = tmp_path / f"{package.replace('-', '_')}-1.31.1.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.31.1\n")
    code = "from layercast.server.environment import onnxruntime_clash; print(onnxruntime_clash())"
    environ = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
    assert "both installed" in result.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_status_without_a_gpu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "cpu_budget", lambda: 1)
    assert re.fullmatch(r".+: running on CPU, 1 thread", environment.cuda_status())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_status_names_the_gpu() -> None:
    assert torch.cuda.get_device_name(0) in environment.cuda_status()


def test_cuda_status_lists_every_card(monkeypatch: pytest.MonkeyPatch) -> None:
    class Card:
        name = "NVIDIA H100"
        total_memory = 80 * GIB

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _index: Card())
    assert environment.cuda_status() == "CUDA 13.0: NVIDIA H100 (80 GiB), NVIDIA H100 (80 GiB)"


def test_cuda_status_when_torch_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert environment.cuda_status().startswith("torch cannot be imported")
