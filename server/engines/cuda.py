"""Everything that is asked of CUDA, in one place. Nothing here touches it unless a model runs on a card."""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Final, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

PROVIDER: Final = "CUDAExecutionProvider"

_HIGH: Final = -1
_capturing = threading.Lock()
"""Held while a graph is recorded: one at a time in a process, and nobody may give memory back meanwhile."""


def count() -> int:
    """Return how many CUDA devices torch can use here."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def name(index: int) -> str:
    """Return the model of a card."""
    return torch.cuda.get_device_name(index)


def in_use() -> bool:
    """Tell whether this process computes with CUDA."""
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def release() -> None:
    """Give memory that torch keeps for later back to the cards, for instance to ONNX Runtime."""
    if not in_use():
        return
    with _capturing:
        torch.cuda.empty_cache()


class Card:
    """One CUDA device: streams, events, page-locked memory, graphs (docs.pytorch.org, notes, CUDA semantics).

    `device` is where tensors go. Streams and events are torch's; callers only hand them back.
    """

    def __init__(self, index: int) -> None:
        self.device = torch.device("cuda", index)
        # Float32 is float32: by default convolutions round to the 10 bits of TF32, and miss the golden outputs.
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False

    def stream(self) -> Any:
        """Return a new stream, which runs beside all others."""
        return torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]

    def capture_stream(self) -> Any:
        """Return a stream to record graphs on; no other has its priority.

        Torch hands the same 32 streams of a priority out again and again. What another thread queues on the one that
        records would be recorded too.
        """
        return torch.cuda.Stream(self.device, priority=_HIGH)  # type: ignore[no-untyped-call]

    def on(self, stream: Any) -> AbstractContextManager[Any]:
        """Queue what the body does on `stream`, and make its card this thread's."""
        return torch.cuda.stream(stream)

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Queue a copy on the current stream; beside the host where `source` or `target` is page-locked memory."""
        target.copy_(source, non_blocking=True)

    def record(self, stream: Any) -> Any:
        """Return an event that happens when all that is queued on `stream` now is done."""
        # Who waits for it sleeps, and leaves the processor to the event loop.
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(stream)
        return event

    def wait(self, stream: Any, event: Any) -> None:
        """Let what is queued on `stream` from now on wait for `event`."""
        stream.wait_event(event)

    def finish(self, event: Any) -> None:
        """Return when `event` has happened."""
        event.synchronize()

    def synchronize(self) -> None:
        """Return when everything that is queued on the card is done."""
        torch.cuda.synchronize(self.device)

    def pinned(self, size: int) -> Tensor:
        """Return page-locked memory of `size` bytes, from which and to which copies run beside the host."""
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def keep(self, tensor: Tensor, stream: Any) -> None:
        """Let the memory of `tensor`, made on another stream, not be used again before `stream` is done with it."""
        tensor.record_stream(stream)

    def pool(self) -> Any:
        """Return memory that graphs may share which never run at the same time."""
        with torch.cuda.device(self.device):
            return torch.cuda.graph_pool_handle()

    def capture(self, forward: Callable[[], T], stream: Any, pool: Any) -> tuple[Any, T]:
        """Record what `forward` queues, without running it, as a graph; return that and what `forward` returned.

        Whatever can't be recorded raises: waiting for the card, values read on the host, memory from outside the pool.
        """
        graph = torch.cuda.CUDAGraph()
        # The other threads of a server go on computing meanwhile: only this one's calls may spoil the capture.
        capture = torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local")
        with _capturing, torch.cuda.device(self.device), capture:
            result = forward()
        return graph, result

    def replay(self, graph: Any) -> None:
        """Queue a graph on the current stream."""
        graph.replay()

    def providers(self, stream: Any) -> list[Any]:
        """Return ONNX Runtime's providers for this card, which compute on `stream`."""
        options = {
            "device_id": self.device.index,
            "user_compute_stream": str(stream.cuda_stream),
            "use_tf32": 0,
            # An exhaustive search takes seconds for each new number of rows, in front of a caller.
            "cudnn_conv_algo_search": "HEURISTIC",
            # Torch uses the same card: no powers of two.
            "arena_extend_strategy": "kSameAsRequested",
        }
        return [(PROVIDER, options), "CPUExecutionProvider"]
