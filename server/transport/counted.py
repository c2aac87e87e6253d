"""Calls are counted by their end."""

import time
from typing import Any, Literal, TypeAlias

import grpc

from layercast.server.metrics import Metrics

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Kind = Literal["unary", "server_stream", "bidi_stream"]


def kind_of(handler: Any) -> Kind:
    """Return how many messages go each way; no RPC of ours takes several and answers with one."""
    if handler.request_streaming:
        return "bidi_stream"
    return "server_stream" if handler.response_streaming else "unary"


class Counted:
    """Counts the calls of one RPC."""

    def __init__(self, service: str, name: str, metrics: Metrics, kind: Kind = "unary") -> None:
        self.path = f"/{service}/{name}"
        labels = (kind, service, name)
        self.received = metrics.rpc_received.labels(*labels)
        self.sent = metrics.rpc_sent.labels(*labels)
        self._started = metrics.rpc_started.labels(*labels)
        self._duration = metrics.rpc_duration.labels(*labels)
        self._handled = {code: metrics.rpc_handled.labels(*labels, code.name) for code in grpc.StatusCode}
        self._ok = self._handled[grpc.StatusCode.OK]

    def begun(self) -> float:
        """Count a call and return when it began."""
        self._started.inc()
        return time.perf_counter()

    def answered(self, start: float) -> None:
        """Count the answer to a call of one message, which began at `start`, and its end."""
        self.sent.inc()
        self._ok.inc()
        self._duration.observe(time.perf_counter() - start)

    def left(self, late: bool, start: float) -> None:
        """Count a call whose caller has gone, or else (`late`) whose deadline was over."""
        self.ended(grpc.StatusCode.DEADLINE_EXCEEDED if late else grpc.StatusCode.CANCELLED, start)

    def cut_short(self, code: grpc.StatusCode, seconds: float) -> None:
        """Count a call that ended before its message had come, after so long."""
        self._started.inc()
        self._handled[code].inc()
        self._duration.observe(seconds)

    def ended(self, code: grpc.StatusCode, start: float) -> None:
        """Count the end of a call that began at `start`."""
        self._handled[code].inc()
        self._duration.observe(time.perf_counter() - start)
