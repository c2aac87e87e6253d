"""What one model version has done: the Prometheus children and the protocol's statistics, fed from one place."""

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Literal, get_args

from layercast.models.explain import METHODS
from layercast.server.batching.policy import Execution, Limits, Phase, Reason, Rejection
from layercast.server.errors import ServingError
from layercast.server.metrics import Metrics

Kind = Literal["predict", "features", "explain"]
_KINDS: Final[tuple[Kind, ...]] = get_args(Kind)
_REASONS: Final[tuple[Reason, ...]] = ("full", "preferred", "timeout", "idle", "drain")
_REJECTIONS: Final[tuple[Rejection, ...]] = ("queue_full", "too_large", "queue_timeout", "draining")
_PHASES: Final[tuple[Phase, ...]] = ("queued", "running")
# Every status that a request can end with; a series exists for each from the load of a model.
_CODES: Final = sorted({"OK", "CANCELLED", *(error.code.name for error in ServingError.__subclasses__())})


@dataclass(slots=True)
class Duration:
    """A count and the nanoseconds together, as the protocol's StatisticDuration."""

    count: int = 0
    ns: int = 0

    def add(self, ns: int, count: int = 1) -> None:
        """Count one more, or so many of this length."""
        self.count += count
        self.ns += ns * count


@dataclass
class Statistics:
    """The protocol's ModelStatistics: requests in `success`, rows in `inferences`, batches in `executions`."""

    last_inference_ms: int = 0
    inferences: int = 0
    executions: int = 0
    success: Duration = field(default_factory=Duration)
    fail: Duration = field(default_factory=Duration)
    queue: Duration = field(default_factory=Duration)
    compute_input: Duration = field(default_factory=Duration)
    compute_infer: Duration = field(default_factory=Duration)
    compute_output: Duration = field(default_factory=Duration)
    batches: dict[int, Duration] = field(default_factory=lambda: defaultdict(Duration))


class ModelMonitor:
    """Counts for one model version. The metrics' series are looked up once: `labels()` costs more than counting."""

    def __init__(self, metrics: Metrics, model: str, version: str, device: str, limits: Limits) -> None:
        self.statistics = Statistics()
        own = (model, version)
        self._rows = metrics.rows.labels(*own)
        self._taps = metrics.taps.labels(*own)
        self._feature_bytes = metrics.feature_bytes.labels(*own)
        self._early_exits = metrics.early_exits.labels(*own)
        self._hooks = metrics.hooks.labels(*own)
        self._evaluations = {method: metrics.explain_evaluations.labels(*own, method) for method in METHODS}
        self._explain_duration = {method: metrics.explain_duration.labels(*own, method) for method in METHODS}
        self._explain_steps = {method: metrics.explain_steps.labels(*own, method) for method in METHODS}
        self._feature_batches = {engine: metrics.feature_batches.labels(*own, engine) for engine in ("eager", "onnx")}
        self._steered = metrics.steered.labels(*own)
        self._queue_rows = metrics.queue_rows.labels(*own)
        self._queue_bytes = metrics.queue_bytes.labels(*own)
        self._queue_duration = metrics.queue_duration.labels(*own)
        self._compute_duration = metrics.compute_duration.labels(*own, device)
        self._batch_rows = metrics.batch_rows.labels(*own)
        self._request_duration = {kind: metrics.request_duration.labels(*own, kind) for kind in _KINDS}
        self._ended = {(kind, code): metrics.requests.labels(*own, kind, code) for kind in _KINDS for code in _CODES}
        self._answered = {kind: self._ended[kind, "OK"] for kind in _KINDS}
        self._batches = {reason: metrics.batches.labels(*own, reason) for reason in _REASONS}
        self._rejected = {reason: metrics.rejected.labels(*own, reason) for reason in _REJECTIONS}
        # Told apart by phase in a family of its own; here, beside the other ways to go without an answer, it is one.
        self._deadline = metrics.rejected.labels(*own, "deadline")
        self._expired = {when: metrics.expired.labels(*own, when) for when in _PHASES}
        self._cancelled = {when: metrics.cancelled.labels(*own, when) for when in _PHASES}
        self._tokens = metrics.tokens.labels(*own, "real")
        self._padding = metrics.tokens.labels(*own, "padding")
        self.inflight = metrics.inflight.labels(*own)
        metrics.queue_capacity.labels(*own).set(limits.queue_rows)
        metrics.queue_capacity_bytes.labels(*own).set(limits.queue_bytes)

    def queued(self, rows: int, size: int) -> None:
        """So many rows, of so many bytes, wait now."""
        self._queue_rows.set(rows)
        self._queue_bytes.set(size)

    def waited(self, seconds: float, requests: int) -> None:
        """A work, of so many requests, left the queue to be run after so long."""
        self._queue_duration.observe(seconds, requests)

    def executed(self, execution: Execution) -> None:
        """One forward ran and gave what it should."""
        rows, compute_ns = execution.rows, execution.compute_ns
        self._rows.inc(rows)
        self._batches[execution.reason].inc()
        self._batch_rows.observe(rows)
        self._compute_duration.observe(compute_ns / 1e9)
        self._tokens.inc(execution.tokens)
        self._padding.inc(execution.padding)
        self.statistics.inferences += rows
        self.statistics.executions += 1
        self.statistics.batches[rows].add(compute_ns)
        self.statistics.last_inference_ms = time.time_ns() // 1_000_000

    def rejected(self, reason: Rejection) -> None:
        """A request was refused."""
        self._rejected[reason].inc()

    def expired(self, when: Phase) -> None:
        """A request's deadline passed before its answer."""
        self._deadline.inc()
        self._expired[when].inc()

    def cancelled(self, when: Phase) -> None:
        """A caller went away."""
        self._cancelled[when].inc()

    def read_by(self, engine: str) -> None:
        """The layers that a batch taps were read by `engine`."""
        self._feature_batches[engine].inc()

    def tapped(self, layers: int, size: int) -> None:
        """A request, or a part of one, was given so many layers' values, of so many bytes."""
        self._taps.inc(layers)
        self._feature_bytes.inc(size)

    def stopped_early(self, skipped: float) -> None:
        """A forward stopped with this share of the layers not run."""
        self._early_exits.observe(skipped)

    def watch_hooks(self, count: Callable[[], float]) -> None:
        """Show what `count` returns at each scrape as the hooks on the model's modules."""
        self._hooks.set_function(count)

    def evaluated(self, method: str, rows: int) -> None:
        """So many rows ran for an explanation, answered or not."""
        if rows:
            self._evaluations[method].inc(rows)

    def explained(self, method: str, steps: float, compute_ns: int) -> None:
        """An explanation was made, with so many evaluations for each of its rows."""
        self._explain_steps[method].observe(steps)
        self._explain_duration[method].observe(compute_ns / 1e9)

    def steered(self) -> None:
        """A request was answered with layers changed as it said."""
        self._steered.inc()

    def succeeded(
        self, kind: Kind, total: int, decode: int, queue: int, compute: int, encode: int, many: int = 1
    ) -> None:
        """A request, or so many of them, were answered. Where the time of each went is in nanoseconds."""
        self._answered[kind].inc(many)
        self._request_duration[kind].observe(total / 1e9, many)
        statistics = self.statistics
        statistics.success.add(total, many)
        statistics.queue.add(queue, many)
        statistics.compute_input.add(decode, many)
        statistics.compute_infer.add(compute, many)
        statistics.compute_output.add(encode, many)

    def failed(self, kind: Kind, code: str, total_ns: int) -> None:
        """A request ended with an error."""
        self._ended[kind, code].inc()
        self._request_duration[kind].observe(total_ns / 1e9)
        self.statistics.fail.add(total_ns)
