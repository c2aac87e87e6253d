"""Runs callers against a server process for a number of requests or of seconds, and says what was wrong."""

import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from layercast.proto.messages import ModelInferRequest, RepositoryModelLoadRequest
from layercast.proto.rpc import INFERENCE
from oracle.journal import Journal
from oracle.subjects import Subject
from oracle.traffic import Caller, ask

_VICTIM = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from oracle.soak import be_killed
be_killed(sys.argv[1])
"""


@dataclass(frozen=True)
class Load:
    """How much: callers at once, requests a caller or seconds in all (the smaller ends it), clients killed, reloads."""

    callers: int = 16
    requests: int = 100
    seconds: float = 3600.0
    kills: int = 3
    reloads: int = 4


def soak(url: str, subjects: dict[str, Subject], load: Load, repository: Path) -> Journal:
    """Let callers ask, clients die and models be reloaded; return the journal of callers that lived."""
    journal = Journal()
    until = time.monotonic() + load.seconds
    done = threading.Event()

    def call(seed: int) -> None:
        caller = Caller(url, subjects, journal, seed)
        try:
            for _ in range(load.requests):
                if time.monotonic() > until:
                    break
                ask(caller)
        finally:
            caller.close()

    killer = threading.Thread(target=_kill_clients, args=(url, load.kills, done))
    killer.start()
    try:
        with ThreadPoolExecutor(load.callers + 1) as pool:
            reloading = pool.submit(_reload, url, repository, list(subjects), load.reloads, done)
            for running in [pool.submit(call, seed) for seed in range(load.callers)]:
                running.result()
            done.set()
            reloading.result()
    finally:
        done.set()
        killer.join()
    return journal


def _reload(url: str, repository: Path, names: list[str], count: int, done: threading.Event) -> None:
    """Bring version 2 of each model in and take it out again, by turns; what is loaded answers from then on."""
    method = INFERENCE["RepositoryModelLoad"]
    with grpc.insecure_channel(url) as channel:
        load = channel.unary_unary(method.path, method.request.SerializeToString, method.response.FromString)
        for number in range(count):
            name = names[number // 2 % len(names)]
            place, spare = repository / name / "2", repository.parent / f"{name}.spare" / "2"
            if place.exists():
                shutil.rmtree(place)
            else:
                shutil.copytree(spare, place.with_name(".2"))
                place.with_name(".2").rename(place)
            load(RepositoryModelLoadRequest(model_name=name), timeout=60)
            if done.is_set():
                break


def _kill_clients(url: str, count: int, done: threading.Event) -> None:
    """Start clients with requests under way and kill each as it says that it has some, so the server loses them."""
    for _ in range(count):
        command = [sys.executable, "-c", _VICTIM, url, str(Path(__file__).parents[1])]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as victim:
            assert victim.stdout
            victim.stdout.readline()
            victim.send_signal(signal.SIGKILL)
        if done.is_set():
            break


def be_killed(url: str) -> None:
    """Keep requests under way, say so, and wait for the end."""
    method = INFERENCE["ModelInfer"]
    channel = grpc.insecure_channel(url)
    infer = channel.unary_unary(method.path, method.request.SerializeToString, method.response.FromString)
    message = ModelInferRequest(model_name="mnist")
    message.inputs.add(name="image", datatype="FP32", shape=[64, 1, 28, 28])
    message.raw_input_contents.append(np.zeros((64, 1, 28, 28), "f4").tobytes())
    infer(message, timeout=60)
    calls = [infer.future(message, timeout=60) for _ in range(20)]
    print("under way", flush=True)
    while True:
        calls = [infer.future(message, timeout=60) if call.done() else call for call in calls]
        time.sleep(0.001)


def gauges(metrics_url: str, *names: str) -> dict[str, float]:
    """Return the sums of gauges over all models, as the server's metrics page shows them now."""
    with urllib.request.urlopen(metrics_url) as page:
        families = {family.name: family for family in text_string_to_metric_families(page.read().decode())}
    return {name: sum(sample.value for sample in families[name].samples) for name in names}
