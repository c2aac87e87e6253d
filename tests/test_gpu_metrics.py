"""Gauges of GPUs: read from a driver that is a stand-in, when a scrape asks, and never in the way of one."""

import asyncio
import threading
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from starlette.applications import Starlette

from layercast.server import gpus
from layercast.server.engines import cuda
from layercast.server.gpus import Gpus
from layercast.server.metrics import Metrics
from layercast.server.web.app import metrics_application


class Driver:
    """As much of pynvml as is asked."""

    class NVMLError(Exception):
        pass

    def __init__(self, *utilization: int | None) -> None:
        self.utilization = utilization
        self.answering = threading.Event()
        self.answering.set()
        self.calls = 0

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        self.calls += 1
        assert self.answering.wait(30)
        return len(self.utilization)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:  # noqa: N802
        return SimpleNamespace(used=(handle + 1) * 1000, total=80_000)

    def nvmlDeviceGetUUID(self, handle: int) -> str | bytes:  # noqa: N802
        return f"GPU-{handle}" if handle else b"GPU-0"

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> Any:  # noqa: N802
        if self.utilization[handle] is None:
            raise self.NVMLError("Not Supported")
        return SimpleNamespace(gpu=self.utilization[handle])


@pytest.fixture
def driver(monkeypatch) -> Driver:
    made = Driver(45, None)
    monkeypatch.setattr(cuda, "in_use", lambda: True)
    monkeypatch.setattr(gpus, "_load", lambda: made)
    return made


async def scrape(application: Starlette) -> list[str]:
    transport = httpx.ASGITransport(application)
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        text = (await client.get("/metrics")).text
    return [line for line in text.splitlines() if line.startswith("layercast_gpu_")]


async def test_a_scrape_shows_what_the_driver_says_now(driver):
    application = metrics_application(Metrics(), [])
    assert await scrape(application) == [
        'layercast_gpu_utilization_ratio{gpu="0",uuid="GPU-0"} 0.45',
        'layercast_gpu_memory_used_bytes{gpu="0",uuid="GPU-0"} 1000.0',
        'layercast_gpu_memory_used_bytes{gpu="1",uuid="GPU-1"} 2000.0',
        'layercast_gpu_memory_bytes{gpu="0",uuid="GPU-0"} 80000.0',
        'layercast_gpu_memory_bytes{gpu="1",uuid="GPU-1"} 80000.0',
    ]
    driver.utilization = (100, None)
    assert (await scrape(application))[0] == 'layercast_gpu_utilization_ratio{gpu="0",uuid="GPU-0"} 1.0'


async def test_a_driver_that_does_not_answer_holds_up_no_scrape_and_is_asked_once(driver, monkeypatch):
    monkeypatch.setattr(gpus, "_PATIENCE", 0.01)
    application = metrics_application(Metrics(), [])
    driver.answering.clear()
    assert await scrape(application) == []
    assert await scrape(application) == []
    assert driver.calls == 1
    monkeypatch.setattr(gpus, "_PATIENCE", 30)
    waiting = asyncio.create_task(scrape(application))
    driver.answering.set()
    assert len(await waiting) == 5


async def test_without_a_driver_nothing_is_shown_and_it_is_not_looked_for_again(monkeypatch):
    tried: list[int] = []

    def missing() -> None:
        tried.append(1)
        raise ModuleNotFoundError("No module named 'pynvml'")

    monkeypatch.setattr(cuda, "in_use", lambda: True)
    monkeypatch.setattr(gpus, "_load", missing)
    application = metrics_application(Metrics(), [])
    for _ in range(3):
        assert await scrape(application) == []
    assert tried == [1]


async def test_a_process_that_computes_on_the_cpu_asks_no_driver(driver, monkeypatch):
    monkeypatch.setattr(cuda, "in_use", lambda: False)
    assert await scrape(metrics_application(Metrics(), [])) == []
    assert driver.calls == 0


async def test_the_real_package_is_asked_in_its_own_words(monkeypatch):
    nvml = pytest.importorskip("pynvml", reason="needs the package nvidia-ml-py")
    for name in vars(Driver):
        if name.startswith("nvml"):
            assert callable(getattr(nvml, name))
    monkeypatch.setattr(cuda, "in_use", lambda: True)
    registry = CollectorRegistry()
    await (made := Gpus(registry)).refresh()
    assert made._absent == (b"layercast_gpu_memory_bytes" not in generate_latest(registry))
