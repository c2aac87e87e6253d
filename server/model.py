"""A model version that answers: its manifest, its runners, its batcher, its counts."""

import asyncio
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from layercast.models.edits import Planned
from layercast.models.manifest import WEIGHTS_FILE, Manifest
from layercast.server import processors
from layercast.server.batching.batcher import Batcher
from layercast.server.batching.policy import Limits
from layercast.server.batching.waiting import Waiting
from layercast.server.compiled import Mark
from layercast.server.engines.eager import EagerEngine
from layercast.server.engines.tapped import TappedEngine
from layercast.server.errors import InvalidArgument
from layercast.server.inline import NOWHERE, Inline
from layercast.server.monitor import ModelMonitor
from layercast.server.runner import Runner
from layercast.server.settings import ModelSettings
from layercast.server.streams import OpenStreams
from layercast.server.work import Answer, Array, Asker, Tap, Terms, Work

T = TypeVar("T")

_SHORTEST_BUCKET = 16


@dataclass(frozen=True)
class Loaded:
    """A version that was loaded, checked and warmed up.

    `runners` are its instances, with so many `copies` of the weights between them; each computes with `threads`
    threads. `alone`, if any, is one more, which computes with those of all a batch beside which nothing runs.
    `warmup_ms` is one warm forward of one row, `note` what an operator should know of a version that answers, `engines`
    which engine runs which batch of plain predictions, and in how many instances, `inline` which batches are short
    enough for the event loop. `cards` is the CUDA device of each instance, if they run on any.
    """

    manifest: Manifest
    settings: ModelSettings
    runners: tuple[Runner, ...]
    threads: int
    load_seconds: float
    warmup_ms: float
    note: str = ""
    engines: str = ""
    inline: Inline = NOWHERE
    cards: tuple[int, ...] = ()
    copies: int = 1
    alone: Runner | None = None

    @property
    def runner(self) -> Runner:
        """The first instance; the others are its like."""
        return self.runners[0]

    @property
    def memory_bytes(self) -> int:
        """Bytes of the parameters and buffers of every instance, shared ones counted once."""
        eager = self.runner.eager
        return self.copies * (eager.memory_bytes if eager else self.manifest.files[WEIGHTS_FILE].bytes)

    @property
    def limits(self) -> Limits:
        """What the settings mean to the batcher."""
        settings = self.settings
        return Limits(
            max_batch=settings.max_batch,
            # Rows that never share a forward have nobody to wait for.
            max_delay=settings.max_delay_ms / 1000 if settings.batching else 0.0,
            queue_rows=settings.queue_rows,
            queue_bytes=settings.queue_bytes,
            preferred=settings.preferred_batch,
            queue_timeout=settings.queue_timeout_ms / 1000 or None,
            priorities=settings.priorities,
            # Several instances are there to run at the same time.
            inline=self.inline if len(self.runners) == 1 else NOWHERE,
        )


class Group:
    """What a work's inputs mean to the queue: their key, if works are batched at all, their bytes and length."""

    __slots__ = ("bytes", "key", "length")

    def __init__(self, key: Hashable, bytes: int, length: int) -> None:
        self.key = key
        self.bytes = bytes
        self.length = length


class ServedModel:
    """Runs rows of one model version. Made on the event loop, since its batcher lives there."""

    def __init__(self, loaded: Loaded, monitor: ModelMonitor, together: bool = False) -> None:
        """`together` says how the front end hands over: see `Limits`."""
        self.mark = Mark()
        self.loaded = loaded
        self.manifest = loaded.manifest
        self.monitor = monitor
        self._dynamic_outputs = any(spec.dynamic_dimensions() for spec in loaded.manifest.outputs)
        self._padded = next((spec.name for spec in loaded.manifest.inputs if spec.pad is not None), None)
        # Without batching every work is a group of its own.
        self._batching = loaded.settings.batching
        self.on_hurry: Callable[[], None] | None = None
        self._holders = 0
        self._free = asyncio.Event()
        self._free.set()
        loop = asyncio.get_running_loop()
        every = [*loaded.runners, *filter(None, [loaded.alone])]
        engines = [runner.eager for runner in every if runner.eager]
        for engine in engines:
            engine.on_stopped = partial(_told, loop, monitor.stopped_early)
        monitor.watch_hooks(partial(_hooks, [weakref.ref(engine) for engine in engines]))
        for runner in every:
            runner.on_tapped = partial(_told, loop, monitor.read_by)
            if isinstance(runner.taps, TappedEngine):
                runner.taps.on_stopped = partial(_told, loop, monitor.stopped_early)
        places = processors.Places(loaded.threads, len(loaded.runners), bool(loaded.cards))
        limits = replace(loaded.limits, together=together)
        self._gathers = self._batching and limits.gathers
        self.batcher = Batcher(self.manifest.name, loaded.runners, limits, monitor, places.take, loaded.alone)
        self.streams = OpenStreams(self.manifest.name, loaded.limits.queue_bytes, monitor)

    def gathers(self, length: int) -> bool:
        """Tell whether plain requests of this length, which come one by one, wait for each other before the queue."""
        return self._gathers and self.batcher.limits.inline.reaches(length)

    def hold(self, many: int = 1) -> None:
        """Keep the model, which a newer one may replace meanwhile, until `let_go` of as many, which must follow."""
        if not self._holders:
            self._free.clear()
        self._holders += many

    def let_go(self, many: int = 1) -> None:
        """End what `hold` began."""
        self._holders -= many
        if not self._holders:
            self._free.set()

    def hurry(self) -> None:
        """Keep nobody waiting for what may not come: more requests, or a caller who does not read a stream.

        `on_hurry` lets those go on to the batcher that have waited before it.
        """
        if self.on_hurry:
            self.on_hurry()
        self.batcher.hurry()
        self.streams.hurry()

    async def released(self) -> None:
        """Return when nobody holds the model."""
        await self._free.wait()

    async def run(
        self,
        inputs: Mapping[str, Array],
        rows: int,
        taps: tuple[Tap, ...],
        predict: bool,
        terms: Terms,
        edits: tuple[Planned, ...] = (),
    ) -> list[Answer]:
        """Run `rows` rows and return the answers in order: one, or one a part where they exceed the largest batch.

        `edits` are made for these rows alone.

        Raises InvalidArgument for such a request where the model's settings say to refuse it, and what
        `Batcher.submit` raises.
        """
        most = self.loaded.settings.max_batch
        if rows > most and self.loaded.settings.oversized == "refuse":
            self.monitor.rejected("too_large")
            raise InvalidArgument(
                f"the request has {rows} rows, model {self.manifest.name!r} takes at most {most} at once; "
                f"send them in several requests"
            )
        works = [self._work(part, count, taps, predict, edits) for part, count in _parts(inputs, rows, most)]
        return await self.batcher.submit(works, terms)

    def group(self, inputs: Mapping[str, Array], exact: bool = False) -> Group:
        """Return what inputs of these shapes have in common in the queue; `exact` when layers are asked for."""
        # Padding that comes from a neighbour would change the shape of a layer's values, and some reducers' results.
        return self._group(inputs, exact or self._dynamic_outputs)

    def takes_together(self, rows: int, size: int) -> bool:
        """Tell whether plain requests of one group, of so many rows and bytes, may be queued as one work."""
        return self._batching and rows <= self.loaded.settings.max_batch and self.batcher.takes_together(rows, size)

    def enqueue(
        self,
        inputs: Mapping[str, Array],
        rows: int,
        group: Group,
        terms: Terms,
        asker: Asker,
        taps: tuple[Tap, ...] = (),
        predict: bool = True,
    ) -> Waiting:
        """Queue rows, no more than the largest batch, to be answered through `asker`."""
        key = group.key if self._batching else object()
        work = Work(inputs, rows, key, group.bytes, group.length, taps, predict, asker=asker)
        return self.batcher.enqueue([work], terms)

    def _work(
        self,
        inputs: Mapping[str, Array],
        rows: int,
        taps: tuple[Tap, ...],
        predict: bool,
        edits: tuple[Planned, ...],
    ) -> Work:
        group = self.group(inputs, exact=bool(taps or edits))
        key = group.key if self._batching else object()
        if edits:
            # Among themselves: others keep the fastest engine, and see no trace of an edit, not even in rounding.
            key = ("steered", key)
        return Work(inputs, rows, key, group.bytes, group.length, taps, predict, edits)

    def _group(self, inputs: Mapping[str, Array], exact: bool) -> Group:
        length = inputs[self._padded].shape[1] if self._padded else 0
        return Group(self._key(inputs, exact), sum(map(_bytes, inputs.values())), length)

    def _key(self, inputs: Mapping[str, Array], exact: bool) -> Hashable:
        """Return what must be equal for rows to share a forward; token counts only roughly, unless `exact`.

        An exact count that meets a rough one is the bucket's largest, so its rows get no padding there either.
        """
        key = []
        for spec in self.manifest.inputs:
            shape = inputs[spec.name].shape[1:]
            key.append((_bucket(shape[0]), *shape[1:]) if spec.pad is not None and not exact else shape)
        return tuple(key)


def _hooks(engines: Sequence["weakref.ref[EagerEngine]"]) -> int:
    """Return how many hooks there are; the metric that asks must not keep an old version in memory."""
    return sum(engine.hooks for ref in engines if (engine := ref()))


def _told(loop: asyncio.AbstractEventLoop, hear: Callable[[T], None], what: T) -> None:
    """Tell `hear` on the event loop, from the thread of a forward: before its answer, since that comes after."""
    loop.call_soon_threadsafe(hear, what)


def _parts(inputs: Mapping[str, Array], rows: int, most: int) -> Sequence[tuple[Mapping[str, Array], int]]:
    if rows <= most:
        return [(inputs, rows)]
    starts = range(0, rows, most)
    return [({name: a[at : at + most] for name, a in inputs.items()}, min(most, rows - at)) for at in starts]


def _bytes(array: Array) -> int:
    return sum(map(len, array.flat)) if array.dtype.kind == "O" else array.nbytes


def _bucket(length: int) -> int:
    """Return the power of two that `length` fits into: rows of one bucket are padded to the longest among them."""
    return max(_SHORTEST_BUCKET, 1 << (length - 1).bit_length())
