"""What this process runs on: versions, processors, CUDA. The start-up line and `layercast doctor` report it.

Nothing here imports torch unless asked for `cuda_status`, so that it answers where an installation is broken.
"""

import os
import platform
import warnings
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ONNXRUNTIME_PACKAGES = ("onnxruntime-gpu", "onnxruntime")
REPORTED_PACKAGES = ("torch", "numpy", "grpcio", "protobuf")


def installed_version(package: str) -> str | None:
    """The version of an installed distribution, without importing it; None when it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """Versions worth printing, by name, in the order to print them; what is not installed is left out."""
    found: dict[str, str | None] = {"layercast": installed_version("layercast"), "python": platform.python_version()}
    found |= {package: installed_version(package) for package in REPORTED_PACKAGES}
    found["onnxruntime"] = next(filter(None, map(installed_version, ONNXRUNTIME_PACKAGES)), None)
    return {name: text for name, text in found.items() if text is not None}


def protobuf_fault() -> str | None:
    """Why this protobuf must not parse strangers' messages, or None.

    The pure Python implementation follows nested messages and groups until the stack overflows (CVE-2025-4565 and
    later ones of its kind); it is what protobuf falls back to, and what an environment variable can ask for.
    """
    from google.protobuf.internal import api_implementation

    kind = api_implementation.Type()
    if kind == "upb":
        return None
    return (
        f"protobuf runs on its {kind!r} implementation, which hostile messages can bring down; want 'upb': "
        "unset PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION, or install a protobuf wheel for this machine"
    )


def onnxruntime_clash() -> str | None:
    """What is wrong and how to mend it when both packages of ONNX Runtime are installed; None otherwise.

    They write the same folder: which one is imported is a matter of luck, and uninstalling either empties it.
    """
    clashing = [package for package in ONNXRUNTIME_PACKAGES if installed_version(package)]
    if len(clashing) < 2:
        return None
    return (
        f"{' and '.join(clashing)} are both installed and write the same folder, so either may be the one that runs. "
        f"Run: pip uninstall -y {' '.join(clashing)} && pip install onnxruntime-gpu"
    )


def let_idle_threads_sleep() -> None:
    """Have OpenMP's threads, which torch computes with, sleep while they wait. Works until torch is imported.

    By default they spin for a while after each part of a forward, which takes their processors from the event loop:
    on two busy processors a batch then takes ten times as long. What the operator has set stays.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # GNU's, of torch's own wheels
    os.environ.setdefault("KMP_BLOCKTIME", "0")  # Intel's and LLVM's


def cpu_budget(root: Path = Path("/")) -> int:
    """Whole processors this process may use: its affinity, capped by the cgroup quotas above it; at least 1.

    `root` is where /proc and /sys are found. A quota of 1.5 processors counts as 1: with two threads on it, each
    would be stopped for a part of every period.
    """
    try:
        allowed = len(os.sched_getaffinity(0))
    except AttributeError:  # only Linux has affinities
        allowed = os.cpu_count() or 1
    return max(1, int(min([allowed, *_cgroup_quotas(root)])))


def _cgroup_quotas(root: Path) -> Iterator[float]:
    """CPU quotas, in processors, of the cgroups that this process is in and of those around them."""
    mount = root / "sys/fs/cgroup"
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        hierarchy, controllers, path = line.split(":", 2)
        if hierarchy == "0":  # version 2
            tops = [mount, mount / "unified"]
        elif "cpu" in controllers.split(","):
            tops = [mount / "cpu", mount / controllers]
        else:
            continue
        for top in tops:
            # In a container the path may be the host's: the folders that exist are the ones that count.
            for folder in [top / path.lstrip("/"), *(top / path.lstrip("/")).parents]:
                yield from _quota(folder)
                if folder == top:
                    break


def _quota(folder: Path) -> Iterator[float]:
    """The quota set on one cgroup, if there is one. Version 1 writes -1 and version 2 writes max for none."""
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        try:
            quota, period = " ".join((folder / name).read_text() for name in names).split()
        except (OSError, ValueError):
            continue
        if quota.isdigit() and period.isdigit() and int(period):
            yield int(quota) / int(period)


def cuda_status() -> str:
    """One honest line on what will compute: the GPUs, or the processors and why not a GPU."""
    threads = cpu_budget()
    on_cpu = f"running on CPU, {threads} thread{'s' if threads > 1 else ''}"
    try:
        import torch
    except ImportError as error:
        return f"torch cannot be imported ({error})"
    has_driver = Path("/proc/driver/nvidia/version").exists()
    if torch.version.cuda is None:
        why = f"an NVIDIA driver is here, but torch {torch.__version__} is a CPU build"
        return f"{why if has_driver else 'no CUDA device'}: {on_cpu}"
    with warnings.catch_warnings(record=True) as caught:  # torch says why it cannot use a card as a warning
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if not available:
        reasons = [str(warning.message).splitlines()[0] for warning in caught] if has_driver else []
        return f"{'; '.join(reasons) or 'no CUDA device'}: {on_cpu}"
    properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    cards = ", ".join(f"{card.name} ({card.total_memory / 2**30:.0f} GiB)" for card in properties)
    return f"CUDA {torch.version.cuda}: {cards}"
