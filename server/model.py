"""A model version that answers: its manifest, its runner, its batcher, its counts."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

from layercast.models.manifest import Manifest
from layercast.server.batcher import Batcher, Limits
from layercast.server.monitor import ModelMonitor
from layercast.server.runner import Runner
from layercast.server.settings import ModelSettings
from layercast.server.work import Answer, Array, Tap, Work

_SHORTEST_BUCKET = 16


@dataclass(frozen=True)
class Loaded:
    """A version that was loaded, checked and warmed up; `warmup_ms` is one warm forward of one row.

    `memory_bytes` is what parameters and buffers take, `note` what an operator should know of a version that answers.
    """

    manifest: Manifest
    settings: ModelSettings
    runner: Runner
    load_seconds: float
    warmup_ms: float
    memory_bytes: int
    note: str = ""


class ServedModel:
    """Runs rows of one model version. Made on the event loop, since its batcher lives there."""

    def __init__(self, loaded: Loaded, monitor: ModelMonitor) -> None:
        self.loaded = loaded
        self.manifest = loaded.manifest
        self.monitor = monitor
        self._dynamic_outputs = any(spec.dynamic_dimensions() for spec in loaded.manifest.outputs)
        settings = loaded.settings
        limits = Limits(settings.max_batch, settings.max_delay_ms / 1000, settings.queue_rows)
        self.batcher = Batcher(self.manifest.name, loaded.runner, limits, monitor)

    async def run(
        self, inputs: Mapping[str, Array], rows: int, taps: tuple[Tap, ...], predict: bool, deadline: float | None
    ) -> list[Answer]:
        """Run `rows` rows and return the answers in order: one, or one a part where they exceed the largest batch."""
        most = self.batcher.limits.max_batch
        future = self.batcher.future
        # Padding that comes from a neighbour would change the shape of a layer's values, and some reducers' results.
        exact = bool(taps) or self._dynamic_outputs
        works = [
            Work(part, count, self._key(part, exact), future(), taps, predict, deadline)
            for part, count in _parts(inputs, rows, most)
        ]
        return await self.batcher.submit(works, deadline)

    def _key(self, inputs: Mapping[str, Array], exact: bool) -> Hashable:
        """Return what must be equal for rows to share a forward; token counts only roughly, unless `exact`.

        An exact count that meets a rough one is the bucket's largest, so its rows get no padding there either.
        """
        key = []
        for spec in self.manifest.inputs:
            shape = inputs[spec.name].shape[1:]
            key.append((_bucket(shape[0]), *shape[1:]) if spec.pad is not None and not exact else shape)
        return tuple(key)


def _parts(inputs: Mapping[str, Array], rows: int, most: int) -> Sequence[tuple[Mapping[str, Array], int]]:
    if rows <= most:
        return [(inputs, rows)]
    starts = range(0, rows, most)
    return [({name: a[at : at + most] for name, a in inputs.items()}, min(most, rows - at)) for at in starts]


def _bucket(length: int) -> int:
    """Return the power of two that `length` fits into: rows of one bucket are padded to the longest among them."""
    return max(_SHORTEST_BUCKET, 1 << (length - 1).bit_length())
