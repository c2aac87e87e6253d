"""How a server's memory grows: resident bytes sampled from its metrics page while it is under load."""

import statistics
import threading
from types import TracebackType
from typing import Self

from oracle.soak import gauges

_MB = 1e6


class Growth:
    """Samples resident memory while it is open. The first half is warm-up: pools fill, kernels are compiled."""

    def __init__(self, metrics_url: str, every: float = 0.25) -> None:
        self._url = metrics_url
        self._every = every
        self._samples: list[float] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    @property
    def second_half_mb(self) -> float:
        """Growth from the middle of the run to its end, in MB, between medians of a tenth of the samples each."""
        count = len(self._samples)
        width = max(1, count // 10)
        middle, end = self._samples[count // 2 : count // 2 + width], self._samples[-width:]
        return (statistics.median(end) - statistics.median(middle)) / _MB

    def _watch(self) -> None:
        while True:
            self._samples.append(gauges(self._url, "process_resident_memory_bytes")["process_resident_memory_bytes"])
            if self._done.wait(self._every):
                return
