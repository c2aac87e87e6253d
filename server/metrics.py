"""Every Prometheus metric of the server, declared once, on a registry that is passed in.

Labels come only from the server's own table of loaded models, never from a request: an unknown model counts under
`(unknown)`. A model's series exist from its load, at zero, until it is removed.
"""

from collections.abc import Sequence
from typing import Final, TypeVar

from prometheus_client import CollectorRegistry, Info
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

from layercast.server.counting import Count, Family, Level, Spread

LATENCY_BUCKETS: Final = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
)  # fmt: skip
ROW_BUCKETS: Final = tuple(2**power for power in range(13))
SHARE_BUCKETS: Final = (0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
UNKNOWN: Final = "(unknown)"

_MODEL: Final = ("model", "version")
_RPC: Final = ("grpc_type", "grpc_service", "grpc_method")

F = TypeVar("F", Family[Count], Family[Level], Family[Spread])


class Metrics:
    """The metric families, on a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._of_models: list[Family[Count] | Family[Level] | Family[Spread]] = []
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        self._models()
        self._batching()
        self._transport()

    def _models(self) -> None:
        self.model_ready = self._gauge("layercast_model_ready", "1 while the version answers requests", _MODEL)
        self.model_info = self._gauge(
            "layercast_model_info", "Always 1; joins a version to its facts", (*_MODEL, "engine", "device", "sha256")
        )
        self.load_duration = self._gauge("layercast_model_load_duration_seconds", "Time to load and check", _MODEL)
        self.warmup_duration = self._gauge(
            "layercast_model_warmup_duration_seconds", "One warm forward of one row, timed at the load", _MODEL
        )
        self.loads = self._counter(
            "layercast_model_loads_total",
            "Loads of a version that ended, by outcome: ok or failed",
            (*_MODEL, "outcome"),
        )
        self.memory = self._gauge("layercast_model_memory_bytes", "Parameters and buffers", (*_MODEL, "device"))
        self.build_info = Info("layercast_build", "Versions of the server and its libraries", registry=self.registry)

    def _batching(self) -> None:
        self.requests = self._counter("layercast_requests_total", "Requests ended", (*_MODEL, "kind", "code"))
        self.rows = self._counter("layercast_rows_total", "Rows that went through a forward pass", _MODEL)
        self.batches = self._counter(
            "layercast_batches_total", "Forward passes, by why the batch closed", (*_MODEL, "reason")
        )
        self.rejected = self._counter("layercast_rejected_total", "Requests refused or expired", (*_MODEL, "reason"))
        self.expired = self._counter(
            "layercast_expired_total", "Requests whose deadline passed, by where it found them", (*_MODEL, "when")
        )
        self.tokens = self._counter(
            "layercast_batch_tokens_total",
            "Positions of padded inputs in executed batches: sent by callers (real) or added to join them (padding)",
            (*_MODEL, "kind"),
        )
        self.cancelled = self._counter("layercast_cancelled_total", "Requests whose caller left", (*_MODEL, "when"))
        self._features()
        self.request_duration = self._histogram(
            "layercast_request_duration_seconds", "From the decoded request to the ready answer", (*_MODEL, "kind")
        )
        self.queue_duration = self._histogram("layercast_queue_duration_seconds", "Wait in the batcher", _MODEL)
        self.compute_duration = self._histogram(
            "layercast_compute_duration_seconds", "Forward pass of one batch", (*_MODEL, "device")
        )
        self.batch_rows = self._histogram("layercast_batch_rows", "Rows of an executed batch", _MODEL, ROW_BUCKETS)
        self.queue_rows = self._gauge("layercast_queue_rows", "Rows waiting now", _MODEL)
        self.queue_capacity = self._gauge("layercast_queue_capacity_rows", "Rows that may wait", _MODEL)
        self.queue_bytes = self._gauge("layercast_queue_bytes", "Bytes of the inputs that wait now", _MODEL)
        self.queue_capacity_bytes = self._gauge("layercast_queue_capacity_bytes", "Bytes that may wait", _MODEL)
        self.inflight = self._gauge("layercast_inflight_requests", "Requests being answered now", _MODEL)

    def _features(self) -> None:
        self.taps = self._counter("layercast_feature_taps_total", "Layers read, once a request and layer", _MODEL)
        self.feature_batches = self._counter(
            "layercast_feature_batches_total",
            "Batches in which a row taps a layer, by what read it",
            (*_MODEL, "engine"),
        )
        self.steered = self._counter(
            "layercast_steered_requests_total", "Requests answered with values inside the model changed", _MODEL
        )
        self.feature_bytes = self._counter(
            "layercast_feature_bytes_total", "Bytes of layers' values in answers, after reducers", _MODEL
        )
        self.early_exits = self._histogram(
            "layercast_early_exit_skipped_ratio",
            "Forwards that stopped after the deepest layer asked for, by the share of layers that did not run",
            _MODEL,
            SHARE_BUCKETS,
        )
        self.hooks = self._gauge("layercast_hooks", "Hooks on the model's modules now; 0 while nothing runs", _MODEL)
        self.explain_evaluations = self._counter(
            "layercast_explain_evaluations_total", "Rows run through the model for explanations", (*_MODEL, "method")
        )
        self.explain_duration = self._histogram(
            "layercast_explain_duration_seconds", "Time that one explanation computed", (*_MODEL, "method")
        )
        self.explain_steps = self._histogram(
            "layercast_explain_steps", "Evaluations for each row of one explanation", (*_MODEL, "method"), ROW_BUCKETS
        )

    def _transport(self) -> None:
        self.rpc_started = self._counter("grpc_server_started_total", "RPCs started", _RPC)
        self.rpc_handled = self._counter("grpc_server_handled_total", "RPCs ended, by status", (*_RPC, "grpc_code"))
        self.rpc_received = self._counter("grpc_server_msg_received_total", "Messages received", _RPC)
        self.rpc_sent = self._counter("grpc_server_msg_sent_total", "Messages sent", _RPC)
        self.rpc_duration = self._histogram("grpc_server_handling_seconds", "Time from start to end of an RPC", _RPC)
        self.http_requests = self._counter(
            "layercast_http_requests_total", "REST requests ended, by the pattern of the path", ("route", "status")
        )
        self.http_duration = self._histogram(
            "layercast_http_request_duration_seconds", "Time from the head of a REST request to its answer", ("route",)
        )

    def forget(self, model: str, version: int) -> None:
        """Remove every series of a version that is in memory no more."""
        for family in self._of_models:
            family.remove_by_labels({"model": model, "version": str(version)})

    def _counter(self, name: str, text: str, labels: Sequence[str]) -> Family[Count]:
        return self._noted(Family(name, text, "counter", labels, Count, self.registry), labels)

    def _gauge(self, name: str, text: str, labels: Sequence[str]) -> Family[Level]:
        return self._noted(Family(name, text, "gauge", labels, Level, self.registry), labels)

    def _histogram(
        self, name: str, text: str, labels: Sequence[str], buckets: Sequence[float] = LATENCY_BUCKETS
    ) -> Family[Spread]:
        return self._noted(Family(name, text, "histogram", labels, lambda: Spread(buckets), self.registry), labels)

    def _noted(self, family: F, labels: Sequence[str]) -> F:
        if set(_MODEL) <= set(labels):
            self._of_models.append(family)
        return family
