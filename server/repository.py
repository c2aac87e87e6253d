"""The models in memory: loaded, swapped, unloaded.

A version is loaded beside the running one, takes its place between two requests, and the old one answers what it had
admitted before it goes.
"""

import asyncio
import logging
from collections import defaultdict
from collections.abc import Collection, Coroutine, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from layercast.models.foreign.trust import Trust
from layercast.models.manifest import MANIFEST_FILE
from layercast.server import disk, memory
from layercast.server.disk import OnDisk
from layercast.server.errors import MAX_MESSAGE, InvalidArgument, StartError, Unavailable
from layercast.server.index import UNLOADED, Index, Version
from layercast.server.loader import LoadError, load
from layercast.server.metrics import Metrics
from layercast.server.model import Loaded, ServedModel
from layercast.server.monitor import ModelMonitor
from layercast.server.settings import ModelSettings, Settings
from layercast.server.text import fit

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Repository(Index):
    """Loads, swaps and unloads the versions that it is an index of. Lives on one event loop."""

    def __init__(self, settings: Settings, metrics: Metrics, threads: int) -> None:
        super().__init__()
        self._settings = settings
        self._metrics = metrics
        self._threads = threads
        self._trust = Trust.of(settings.trust)
        self._choices = settings.cache / "engines"
        self._root = Path()
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        # One load at a time: two would take twice the memory and the processors from those that answer.
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="layercast-load")
        self._tasks: set[asyncio.Task[Any]] = set()
        self._retiring: dict[ServedModel, asyncio.Task[None]] = {}

    async def load_all(self, root: Path) -> None:
        """Load every version below `root`. One that fails is kept in the index with its reason.

        StartError when `root` is no folder, or holds no model and nothing could add one later. A directory without a
        manifest is one that is still being written.
        """
        self._root = root
        try:
            names = await asyncio.to_thread(disk.models, root)
        except OSError as error:
            raise StartError(f"the repository {str(root)!r} can't be read: {error.strerror}") from error
        found = {name: await self._begun(name) for name in names}
        self._models = {name: {v.number: Version(name, v.number) for v in found[name]} for name in found if found[name]}
        if not self._models and not self._settings.watch and self._settings.model_control == "none":
            raise StartError(f"the repository {str(root)!r} holds no model; want MODEL/VERSION/{MANIFEST_FILE} in it")
        self._counted_on = set(self._models)
        for entry in self.versions():
            self._show(entry)
            self._tell(entry.name)
        for name in list(self._models):
            await self.refresh(name, found[name])
        self._started = True
        for name in self._models:
            self._tell(name)

    async def load(self, name: str) -> None:
        """Bring the model `name` to what its folder holds: new and changed versions in, vanished ones out.

        Returns when it is done, and goes on when its caller leaves. NotFound when the folder holds no such model,
        InvalidArgument when a version can't be served; what served before goes on serving.
        """
        try:
            found = await asyncio.to_thread(disk.versions, self._root, name)
        except OSError as error:
            raise InvalidArgument(f"the folder of model {name!r} can't be read: {error.strerror}") from error
        if not found:
            raise self._unknown(name)
        failed = await self._in_background(self.refresh(name, found, again=True))
        if failed:
            reasons = "; ".join(f"version {version.number}: {version.reason}" for version in failed)
            raise InvalidArgument(f"load failed for model {name!r}: {reasons}", field="model_name")

    async def unload(self, name: str) -> None:
        """Let the model `name` take no new requests; it answers what it has admitted and gives its memory back.

        Returns when new requests are refused. NotFound for a model that is not in the index.
        """
        if name not in self._models:
            raise self._unknown(name)
        await self._in_background(self._unload(name))

    async def refresh(
        self, name: str, found: Iterable[OnDisk], leave: Collection[int] = (), again: bool = False
    ) -> list[Version]:
        """Load what is new or changed among the version directories `found`, and drop those that are gone.

        The versions in `leave` stay as they are. `again` also tries those that failed or were unloaded. Returns the
        versions that can't be served as they are on disk; while there are any, nothing is dropped.
        """
        async with self._locks[name]:
            if self._stopping:
                raise Unavailable("the server is shutting down and loads nothing")
            settings = await asyncio.to_thread(self._model_settings, name)
            latest = isinstance(settings, ModelSettings) and settings.versions == "latest"
            entries = self._models.setdefault(name, {})
            kept, failed = set(leave), []
            for version in sorted(found, key=lambda version: version.number, reverse=latest):
                kept.add(version.number)
                entry = entries.setdefault(version.number, Version(name, version.number))
                if entry.mark != version.mark or (again and (entry.failed or not entry.model)):
                    await self._load(entry, version, settings)
                if entry.failed:
                    failed.append(entry)
                elif latest:
                    break
            if not failed or not kept:
                self._drop(name, [number for number in entries if number not in kept])
            return failed

    def stop(self) -> None:
        """Be not ready from now on, and give up what is being loaded; requests are still answered."""
        self._stopping = True
        for task in self._tasks:
            task.cancel()

    async def drain(self) -> None:
        """Refuse new requests on every model and return once the admitted ones are answered."""
        self.stop()
        served = self._served()
        for model in served:
            model.hurry()
        draining = [model.batcher.drain() for model in served]
        await asyncio.gather(*draining, *(model.released() for model in served), *self._retiring.values())

    async def close(self) -> None:
        """Stop every model; rows still waiting fail with Unavailable. A load that runs is left to itself."""
        self.stop()
        self._loader.shutdown(wait=False, cancel_futures=True)
        retiring = list(self._retiring)
        for task in self._retiring.values():
            task.cancel()
        await asyncio.gather(*(model.batcher.close() for model in (*self._served(), *retiring)))

    def _served(self) -> list[ServedModel]:
        return [version.model for version in self.versions() if version.model]

    async def _begun(self, name: str) -> list[OnDisk]:
        try:
            found = await asyncio.to_thread(disk.versions, self._root, name)
        except OSError as error:
            logger.error("model %s is left out: %s", name, error)
            return []
        waits = self._settings.watch > 0  # for a copy that is under way
        return [version for version in found if version.begun and not (waits and version.lacking)]

    def _model_settings(self, name: str) -> ModelSettings | StartError:
        try:
            return self._settings.for_model(self._root / name)
        except StartError as error:
            return error

    async def _load(self, entry: Version, found: OnDisk, settings: ModelSettings | StartError) -> None:
        """Load one version beside what serves and let it take the place, or note why it can't be served."""
        entry.mark, entry.reason, entry.failed = found.mark, "", True
        if entry.model is None:
            entry.state = "LOADING"
        self._show(entry)
        ended = {outcome: self._metrics.loads.labels(entry.name, entry.number, outcome) for outcome in ("ok", "failed")}
        try:
            if isinstance(settings, StartError) or found.lacking:
                raise LoadError(found.lacking or str(settings))
            run = asyncio.get_running_loop().run_in_executor
            loaded = await run(self._loader, load, found.directory, settings, self._threads, self._trust, self._choices)
            if (loaded.manifest.name, loaded.manifest.version) != (entry.name, entry.number):
                raise LoadError(f"its manifest is of {loaded.manifest.name!r} version {loaded.manifest.version}")
        except LoadError as error:
            # Names in it come from files that anyone may have written.
            entry.reason = fit(str(error), MAX_MESSAGE)
            logger.error("model %s version %d can't be served: %s", entry.name, entry.number, entry.reason)
        except Exception:
            entry.reason = "it failed to load; the server's log says why"
            logger.exception("model %s version %d failed to load", entry.name, entry.number)
        else:
            self._take_place(entry, loaded)
        ended["failed" if entry.failed else "ok"].inc()
        if entry.model is None:
            entry.state = "UNAVAILABLE"
        self._show(entry)
        self._tell(entry.name)

    def _take_place(self, entry: Version, loaded: Loaded) -> None:
        """Let `loaded` answer from the next request on; what answered until now ends what it has admitted."""
        old = entry.model
        entry.model = ServedModel(loaded, self._monitor(entry, loaded), self._settings.hands_over_together)
        entry.state, entry.failed, entry.reason = "READY", False, loaded.note
        self._counted_on.add(entry.name)
        if old:
            self._retire(entry, old)

    async def _unload(self, name: str) -> None:
        async with self._locks[name]:
            self._counted_on.discard(name)
            for entry in self._models.get(name, {}).values():
                self._out(entry)
            self._tell(name)

    def _drop(self, name: str, numbers: list[int]) -> None:
        """Forget versions that are no more on disk."""
        for number in numbers:
            entry = self._models[name].pop(number)
            logger.info("model %s version %d is no more to be served", name, number)
            self._out(entry)
        if not self._models[name]:
            del self._models[name]
            self._counted_on.discard(name)
        if numbers:
            self._tell(name)

    def _out(self, entry: Version) -> None:
        model, entry.model, entry.failed = entry.model, None, False
        if model:
            entry.state, entry.reason = "UNLOADING", UNLOADED
            self._show(entry)
            self._retire(entry, model)
        elif entry.state != "UNLOADING":
            self._gone(entry)

    def _retire(self, entry: Version, model: ServedModel) -> None:
        entry.leaving += 1
        self._retiring[model] = asyncio.create_task(self._let_go(entry, model))

    async def _let_go(self, entry: Version, model: ServedModel) -> None:
        # A request that came to this model may still be decoded; it is answered, not refused.
        model.hurry()
        await model.released()
        await model.batcher.drain()
        await model.batcher.close()
        del self._retiring[model]
        entry.leaving -= 1
        if entry.state == "UNLOADING" and not entry.leaving:
            self._gone(entry)
        del model
        await asyncio.to_thread(memory.trim)

    def _gone(self, entry: Version) -> None:
        """Nothing of `entry` is left in memory, unless it was loaded again meanwhile."""
        entry.state, entry.reason = "UNAVAILABLE", UNLOADED
        now = self._models.get(entry.name, {}).get(entry.number)
        if now is None or now is entry:
            self._metrics.forget(entry.name, entry.number)

    async def _in_background(self, work: Coroutine[Any, Any, T]) -> T:
        """Await `work` in a task of its own, which goes on when the caller is cancelled."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if self._stopping and task.cancelled():
                raise Unavailable("the server is shutting down and has given this up") from None
            raise

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # the caller, who would have been told, may have left

    def _monitor(self, version: Version, loaded: Loaded) -> ModelMonitor:
        labels = (version.name, str(version.number))
        engine, metrics, manifest = loaded.runner.fast, self._metrics, loaded.manifest
        digest = manifest.files["weights.safetensors"].sha256[:8]
        metrics.model_info.remove_by_labels({"model": labels[0], "version": labels[1]})
        metrics.model_info.labels(*labels, engine.name, engine.device, digest).set(1)
        metrics.load_duration.labels(*labels).set(loaded.load_seconds)
        metrics.warmup_duration.labels(*labels).set(loaded.warmup_ms / 1000)
        metrics.memory.labels(*labels, engine.device).set(loaded.memory_bytes)
        return ModelMonitor(metrics, *labels, engine.device, loaded.limits)

    def _show(self, entry: Version) -> None:
        self._metrics.model_ready.labels(entry.name, entry.number).set(int(entry.model is not None))
