"""A card that is none: it computes on the CPU, as late as CUDA may, and notes what it is asked.

Copies and graphs are done only when somebody waits for them, so that who forgets to wait gets the wrong values, and a
graph runs again the operators that its capture saw, without Python. `use` puts such cards behind `engines.cuda`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from layercast.server.engines import cuda

NOISE = 0x7F
"""What memory holds before anything is copied there."""


class Stream:
    cuda_stream = 0

    def __init__(self, name: str) -> None:
        self.name = name
        self.queue: list[Callable[[], Any]] = []
        self.done = 0

    def flush(self, until: int | None = None) -> None:
        """Do what is queued, up to the place `until`."""
        until = len(self.queue) if until is None else until
        while self.done < until:
            self.done += 1
            self.queue[self.done - 1]()


class Event:
    def __init__(self, stream: Stream) -> None:
        self.stream, self.place = stream, len(stream.queue)

    def finish(self) -> None:
        self.stream.flush(self.place)


class Tape(TorchDispatchMode):
    """Notes operators; refuses what waits for the card."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.item.default, torch.ops.aten._local_scalar_dense.default):
            raise RuntimeError("operation not permitted when stream is capturing\nand more lines")
        result = function(*args, **(kwargs or {}))
        self.steps.append((function, args, kwargs or {}, result))
        return result

    def play(self) -> None:
        with torch.inference_mode():
            for function, args, kwargs, result in self.steps:
                for kept, new in zip(tree_leaves(result), tree_leaves(function(*args, **kwargs)), strict=True):
                    if isinstance(kept, torch.Tensor):
                        kept.copy_(new)


class FakeCard:
    def __init__(self, index: int) -> None:
        self.index = index
        self.device = torch.device("cpu")
        self.log: list[str] = []
        self.copied: list[int] = []
        self.streams: list[Stream] = []
        self.current: Stream | None = None

    def stream(self) -> Stream:
        return self._stream(("compute", "copy")[len(self.streams)])

    def capture_stream(self) -> Stream:
        return self._stream("capture")

    def _stream(self, name: str) -> Stream:
        self.streams.append(Stream(name))
        return self.streams[-1]

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        # What Python computes here is computed at once: after all that the stream was told to wait for, and no more.
        stream.flush()
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        assert self.current is not None
        self.log.append(f"{self.current.name}: copy {list(source.shape)}")
        self.copied.append(source.nbytes)

        def copy() -> None:
            with torch.inference_mode():
                target.copy_(source)

        self.current.queue.append(copy)

    def record(self, stream: Stream) -> Event:
        self.log.append(f"{stream.name}: record")
        return Event(stream)

    def wait(self, stream: Stream, event: Event) -> None:
        self.log.append(f"{stream.name}: wait for {event.stream.name}")
        stream.queue.append(event.finish)

    def finish(self, event: Event) -> None:
        self.log.append(f"host: wait for {event.stream.name}")
        event.finish()

    def synchronize(self) -> None:
        for stream in self.streams:
            stream.flush()

    def pinned(self, size: int) -> torch.Tensor:
        if size:
            self.log.append(f"host: pin {size}")
        return torch.full((size,), NOISE, dtype=torch.uint8)

    def keep(self, tensor: torch.Tensor, stream: Stream) -> None:
        self.log.append(f"{stream.name}: keep {list(tensor.shape)}")

    def pool(self) -> object:
        return self

    def capture(self, forward: Callable[[], Any], stream: Stream, pool: object) -> tuple[Tape, Any]:
        assert pool is self
        self.log.append(f"{stream.name}: record a graph")
        with Tape() as tape:
            result = forward()
        for value in result.values():
            value.fill_(NOISE)  # nothing runs during a capture
        return tape, result

    def replay(self, graph: Tape) -> None:
        assert self.current is not None
        self.log.append(f"{self.current.name}: replay")
        self.current.queue.append(graph.play)

    def providers(self, stream: Stream) -> list[Any]:
        return ["CPUExecutionProvider"]


@contextmanager
def use(count: int = 1, card: type[FakeCard] = FakeCard) -> Iterator[list[FakeCard]]:
    """Let torch see `count` cards, and yield those that are taken, one for each engine."""
    made: list[FakeCard] = []

    def make(index: int) -> FakeCard:
        made.append(card(index))
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "count", lambda: count)
        patch.setattr(cuda, "name", lambda index: f"card {index}")
        patch.setattr(cuda, "Card", make)
        yield made
