"""Layercast beside its peers under the same load, in turn (`make bench`): a table of rates and ratios, and JSON.

Every server is started for each measurement, asked one question, whose answer must be the first server's, loaded by
h2load in a closed loop, asked again and stopped. Servers take turns, A B C A B C; figures are medians over the rounds.
Load and server share the machine. `--peers DIR` names a folder with `triton.py`, which serves an ONNX file with a
Triton server (Python backend, ONNX Runtime inside); `--peers-python` is the interpreter that has it installed.
Without it only Layercast, what grpc.aio can do at most, and the engines in process are measured.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from load import Load, Server, run
from workloads import WORKLOADS, Workload, rows, write_repository

from layercast.models.foreign.trust import ARTEFACT_CODE
from layercast.models.manifest import Manifest
from layercast.proto.messages import ModelInferResponse
from layercast.server.environment import cpu_budget
from layercast.server.settings import default_cache

HERE = Path(__file__).parent
PACKAGES = ("torch", "onnxruntime-gpu", "onnxruntime", "grpcio", "protobuf", "numpy", "uvloop", "pyvoy")


@dataclass(frozen=True)
class Bench:
    """Where everything is, and the options."""

    repository: Path
    folder: Path
    args: argparse.Namespace

    def manifest(self, model: str) -> Manifest:
        """Return the manifest of the model's highest version."""
        versions = [path for path in (self.repository / model).iterdir() if path.is_dir()]
        return Manifest.read(max(versions, key=lambda path: int(path.name)))


def main() -> int:
    """Measure what was asked for and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, help="folder with triton.py")
    parser.add_argument("--peers-python", type=Path, default=Path.home() / ".cache/layercast-peers/triton/bin/python")
    parser.add_argument("--front-ends", default="direct,grpcio,envoy")
    parser.add_argument("--only", default="", help="regular expression over the names of the workloads")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=5)
    parser.add_argument("--cache", type=Path, default=default_cache())
    parser.add_argument("--serve", default="", help="more options of `layercast serve`")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    wanted = [workload for workload in WORKLOADS if re.search(args.only, workload.name)]
    with tempfile.TemporaryDirectory() as folder:
        repository = Path(folder) / "models"
        write_repository(repository, args.cache)
        bench = Bench(repository, Path(folder), args)
        report: dict[str, Any] = {"machine": machine(), "rounds": args.rounds, "seconds": args.seconds, "workloads": {}}
        print(json.dumps(report["machine"], indent=1))
        for workload in wanted:
            report["workloads"][workload.name] = measure(bench, workload)
            if args.json:
                args.json.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report))
    return 0


def machine() -> dict[str, str]:
    """Return what the figures depend on."""
    cpu = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    found = {
        "cpu": cpu[1] if cpu else platform.machine(),
        "cpus": str(cpu_budget()),
        "python": platform.python_version(),
    }
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found | {"load average before": f"{os.getloadavg()[0]:.2f}"}


def measure(bench: Bench, workload: Workload) -> dict[str, Any]:
    """Return every run of every server under `workload`, their medians, and what the engines do in process."""
    runs: dict[str, list[Load]] = defaultdict(list)
    oracle: list[np.ndarray] = []
    servers = list(_servers(bench, workload))
    for _ in range(bench.args.rounds):
        for server in servers:
            try:
                load = run(server, workload, bench.args.seconds, oracle)
            except grpc.RpcError as error:
                if server.name != "triton":
                    raise
                # It dies now and then when connections end with calls in flight, as the last of a load do.
                print(f"{workload.name:45} {server.name:10} gone after the load: {error.code()}", flush=True)
                continue
            runs[server.name].append(load)
            print(
                f"{workload.name:45} {server.name:10} {load.rate:9.0f}/s  p50 {load.p50_ms:.2f}  p99 {load.p99_ms:.2f} "
                f"ms  {load.memory_mb} MB  ready {load.ready_s:.1f} s", flush=True,
            )  # fmt: skip
    in_process = _limits(bench, workload)
    print(f"{workload.name:45} in process {in_process}", flush=True)
    medians = {
        name: {key: statistics.median(load.json()[key] for load in loads) for key in loads[0].json()}
        for name, loads in runs.items()
    }
    every = {name: [load.json() for load in loads] for name, loads in runs.items()}
    return {"median": medians, "in process": in_process, "runs": every}


def _servers(bench: Bench, workload: Workload) -> Iterable[Server]:
    args = bench.args
    for at, front_end in enumerate(args.front_ends.split(",")):
        port = 8400 + 10 * at
        yield Server(front_end, serve_command(bench.repository, front_end, port, args), port)
    if args.peers and not workload.output:
        yield _triton(bench, workload)
    if workload.model == "mnist" and workload.shape[0] == 1:
        yield _echo(bench, workload)


def serve_command(repository: Path, front_end: str, port: int, args: argparse.Namespace) -> list[str]:
    """Return the command of our server, whose ports are `port` and the two after it."""
    command = [
        sys.executable, "-m", "layercast.server", "serve", "--repository", str(repository), "--trust", ARTEFACT_CODE,
        "--grpc-port", str(port), "--http-port", str(port + 1), "--metrics-port", str(port + 2), "--cache",
        str(args.cache), *args.serve.split(),
    ]  # fmt: skip
    return [*command, "--front-end", front_end]


def _triton(bench: Bench, workload: Workload) -> Server:
    model = bench.manifest(workload.model)
    onnx = bench.repository / workload.model / str(model.version) / "model.onnx"
    instances = 1 if workload.concurrency == 1 else 2  # the best settings found on two cores
    command = [
        str(bench.args.peers_python), str(bench.args.peers / "triton.py"), "--onnx", str(onnx), "--name", model.name,
        "--port", "8501", "--threads", "1", "--instances", str(instances),
    ]  # fmt: skip
    return Server("triton", command, 8501, (("PYTHONPATH", ""),))


def _echo(bench: Bench, workload: Workload) -> Server:
    """A server whose answer is right because it is always the same."""
    manifest = bench.manifest(workload.model)
    spec, output = manifest.inputs[0], manifest.outputs[0]
    answer = bench.folder / "answer"
    response = ModelInferResponse(model_name=workload.model, model_version="1", id="1")
    logits = _offline(bench, workload)
    response.outputs.add(name=output.name, datatype="FP32", shape=logits.shape)
    response.raw_output_contents.append(logits.tobytes())
    answer.write_bytes(response.SerializeToString())
    answer.with_suffix(".input").write_text(f"{spec.name} {spec.datatype}")
    return Server("echo", [sys.executable, str(HERE / "echo.py"), "--port", "8601", "--answer", str(answer)], 8601)


def _offline(bench: Bench, workload: Workload) -> np.ndarray:
    import onnxruntime

    manifest = bench.manifest(workload.model)
    path = bench.repository / workload.model / str(manifest.version) / "model.onnx"
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    spec = manifest.inputs[0]
    return np.asarray(session.run(None, {spec.name: rows(spec.datatype, workload.shape)})[0])


def _limits(bench: Bench, workload: Workload) -> dict[str, float]:
    command = [
        sys.executable, str(HERE / "limits.py"), "--repository", str(bench.repository), "--model", workload.model,
        "--shape", ",".join(map(str, workload.shape)), "--layer", workload.output.removeprefix("layer:"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def table(report: dict[str, Any]) -> str:
    """Return the medians as a Markdown table: requests/s of each server, ratios to Triton and to the best engine."""
    workloads = report["workloads"]
    servers = list(dict.fromkeys(name for found in workloads.values() for name in found["median"]))
    ours = [name for name in servers if name not in {"triton", "echo"}]
    head = [
        "workload",
        *(f"{name}, /s (p99 ms)" for name in servers),
        *(f"{name} / triton" for name in ours),
        *(f"{name} / in process (less the load)" for name in ours),
        "in process, rows/s",
    ]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for workload, found in workloads.items():
        median = found["median"]
        cells = [f"{median[s]['rate']:,.0f} ({median[s]['p99_ms']:.1f})" if s in median else "" for s in servers]
        triton = median.get("triton", {}).get("rate")
        cells += [f"{median[name]['rate'] / triton:.2f}" if triton and name in median else "" for name in ours]
        cells += [_of_limit(median[name], found["in process"], int(report["machine"]["cpus"])) for name in ours]
        cells.append(", ".join(f"{engine} {rate:,.0f}" for engine, rate in found["in process"].items()))
        lines.append(f"| {workload} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _of_limit(load: dict[str, float], limits: dict[str, float], cpus: int) -> str:
    """Return the rate as a part of the best engine's, which has every processor, and of what the load leaves it."""
    part = load["rate"] / max(limits.values())
    return f"{part:.2f} ({part * cpus / (cpus - load['load_cpus']):.2f})"


if __name__ == "__main__":
    sys.exit(main())
