"""What the GPUs do, as NVIDIA's NVML says: gauges on the metrics page.

Read when a scrape asks, in a thread, and only once this process computes with CUDA. Without the package nvidia-ml-py
or its driver there is nothing to see, and nothing is said.
"""

import asyncio
import logging
import threading
from collections.abc import Iterator
from importlib import import_module
from typing import Any, Final, NamedTuple

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.core import GaugeMetricFamily

from layercast.server.engines import cuda

logger = logging.getLogger(__name__)

_PATIENCE: Final = 0.25
"""Seconds that a scrape waits for the driver; one that takes longer goes without."""

_LABELS: Final = ("gpu", "uuid")


class Reading(NamedTuple):
    """One GPU, by its number in NVML: how busy it was, as a part of 1, and its memory in bytes.

    Of one that does not tell, `utilization` is None.
    """

    gpu: int
    uuid: str
    utilization: float | None
    used: int
    total: int


class Gpus:
    """The gauges of all GPUs of the machine, on `registry`. Used on the event loop."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._readings: list[Reading] = []
        self._nvml: Any = None
        self._absent = False
        self._reading: asyncio.Event | None = None
        registry.register(self)

    async def refresh(self) -> None:
        """Read the gauges anew, if there are any."""
        if self._absent or not cuda.in_use():
            return
        if self._reading is None or self._reading.is_set():
            self._readings, self._reading = [], asyncio.Event()
            # A daemon, so that a driver that never answers can't keep the process alive.
            arguments = (asyncio.get_running_loop(), self._reading)
            threading.Thread(target=self._read, args=arguments, name="gpus", daemon=True).start()
        try:
            await asyncio.wait_for(self._reading.wait(), _PATIENCE)
        except TimeoutError:
            return

    def describe(self) -> Iterator[Metric]:
        """Yield the metrics without their values."""
        yield from _families()

    def collect(self) -> Iterator[Metric]:
        """Yield what was read last; nothing where there are no GPUs."""
        if not self._readings:
            return
        utilization, used, total = families = _families()
        for reading in self._readings:
            labels = (str(reading.gpu), reading.uuid)
            if reading.utilization is not None:
                utilization.add_metric(labels, reading.utilization)
            used.add_metric(labels, reading.used)
            total.add_metric(labels, reading.total)
        yield from families

    def _read(self, loop: asyncio.AbstractEventLoop, done: asyncio.Event) -> None:
        readings: list[Reading] = []
        try:
            if self._nvml is None:
                self._nvml = _load()
            readings = _readings(self._nvml)
        except Exception as error:  # NVML's errors are of classes that it makes
            logger.info("no figures of GPUs: %s: %s", type(error).__name__, error)
            self._absent = True
        try:
            loop.call_soon_threadsafe(self._have, readings, done)
        except RuntimeError:  # the loop is closed: nobody is there to be told
            return

    def _have(self, readings: list[Reading], done: asyncio.Event) -> None:
        self._readings = readings
        done.set()


def _families() -> tuple[GaugeMetricFamily, GaugeMetricFamily, GaugeMetricFamily]:
    return (
        GaugeMetricFamily("layercast_gpu_utilization_ratio", "Part of the time that the GPU computed", labels=_LABELS),
        GaugeMetricFamily("layercast_gpu_memory_used_bytes", "Memory of the GPU in use, by anyone", labels=_LABELS),
        GaugeMetricFamily("layercast_gpu_memory_bytes", "Memory of the GPU", labels=_LABELS),
    )


def _load() -> Any:
    nvml = import_module("pynvml")  # of the package nvidia-ml-py
    nvml.nvmlInit()
    return nvml


def _readings(nvml: Any) -> list[Reading]:
    readings = []
    for gpu in range(nvml.nvmlDeviceGetCount()):
        handle = nvml.nvmlDeviceGetHandleByIndex(gpu)
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        uuid = nvml.nvmlDeviceGetUUID(handle)
        text = uuid.decode() if isinstance(uuid, bytes) else uuid
        try:
            utilization = nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100
        except nvml.NVMLError:  # a card that is shared out (MIG) has none
            utilization = None
        readings.append(Reading(gpu, text, utilization, memory.used, memory.total))
    return readings
