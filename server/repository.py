"""The models on disk and in memory: which versions there are, in what state, and which one answers a request."""

import asyncio
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from layercast.models.foreign.trust import Trust
from layercast.models.manifest import MANIFEST_FILE
from layercast.proto.codec import quoted
from layercast.server.errors import InvalidArgument, NotFound, StartError, Unavailable
from layercast.server.layers import near
from layercast.server.loader import LoadError, load
from layercast.server.metrics import Metrics
from layercast.server.model import Loaded, ServedModel
from layercast.server.monitor import ModelMonitor
from layercast.server.settings import Settings

logger = logging.getLogger(__name__)

State = Literal["LOADING", "READY", "UNAVAILABLE"]

_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z")
_VERSION = re.compile(r"^[1-9][0-9]{0,17}\Z")


@dataclass
class Version:
    """One version in the index; `model` answers while the state is READY."""

    name: str
    number: int
    state: State = "LOADING"
    reason: str = ""
    model: ServedModel | None = None


class Repository:
    """Loads versions and finds the one that a request names."""

    def __init__(self, settings: Settings, metrics: Metrics, threads: int) -> None:
        self._settings = settings
        self._metrics = metrics
        self._threads = threads
        self._models: dict[str, dict[int, Version]] = {}
        self._listeners: list[Callable[[str, bool], None]] = []
        self._accepting = False

    def listen(self, listener: Callable[[str, bool], None]) -> None:
        """Call `listener(model, ready)` whenever a model becomes ready or stops being so."""
        self._listeners.append(listener)

    @property
    def ready(self) -> bool:
        """Whether loading has ended, no shutdown has begun, and every model has a version that answers."""
        return self._accepting and all(self._newest(name) for name in self._models)

    def versions(self) -> list[Version]:
        """Return every version known, by name and number."""
        return [versions[number] for _, versions in sorted(self._models.items()) for number in sorted(versions)]

    async def load_all(self, root: Path) -> None:
        """Load every version below `root`. One that fails is kept in the index with its reason."""
        found = await asyncio.to_thread(scan, root)
        for name, number in found:
            self._models.setdefault(name, {})[number] = Version(name, number)
        for version in self.versions():
            await self._load(version, root / version.name / str(version.number))
        self._accepting = True
        for name in self._models:
            self._tell(name)

    def find(self, name: str, version: str) -> ServedModel:
        """Return the model that answers for `name` and `version` ("" for the highest ready version).

        Raises NotFound for an unknown model or version, InvalidArgument for a version that is no number, Unavailable
        for one that is known but not ready.
        """
        versions = self._models.get(name)
        if versions is None:
            if not name:
                raise InvalidArgument("model_name is empty; " + near("", sorted(self._models)), field="model_name")
            raise NotFound(
                f"Request for unknown model: {quoted(name)}; {near(name, sorted(self._models))}", field="model_name"
            )
        if not version:
            newest = self._newest(name)
            if newest is None:
                raise Unavailable(f"model {name!r} has no ready version: {self._why(versions)}", retry_after=1.0)
            return newest
        if not _VERSION.match(version):
            raise InvalidArgument(
                f"model_version must be a positive whole number without leading zeros, got {quoted(version)}",
                field="model_version",
            )
        entry = versions.get(int(version))
        if entry is None:
            known = ", ".join(str(number) for number in sorted(versions))
            raise NotFound(f"model {name!r} has no version {version}; known: {known}", field="model_version")
        if entry.model is None:
            raise Unavailable(
                f"version {version} of model {name!r} is not ready: {entry.reason or 'it is loading'}", retry_after=1.0
            )
        return entry.model

    async def drain(self) -> None:
        """Refuse new requests on every model and return once the admitted ones are answered."""
        self._accepting = False
        await asyncio.gather(*(version.model.batcher.drain() for version in self.versions() if version.model))

    async def close(self) -> None:
        """Stop every model; rows still waiting fail with Unavailable."""
        await asyncio.gather(*(version.model.batcher.close() for version in self.versions() if version.model))

    def _newest(self, name: str) -> ServedModel | None:
        ready = {number: version.model for number, version in self._models[name].items() if version.model}
        return ready[max(ready)] if ready else None

    @staticmethod
    def _why(versions: dict[int, Version]) -> str:
        return "; ".join(f"version {v.number}: {v.reason or v.state.lower()}" for v in versions.values())

    async def _load(self, version: Version, directory: Path) -> None:
        settings = self._settings.for_model(directory.parent)
        try:
            loaded = await asyncio.to_thread(load, directory, settings, self._threads, Trust.of(self._settings.trust))
            if (loaded.manifest.name, loaded.manifest.version) != (version.name, version.number):
                raise LoadError(f"its manifest is of {loaded.manifest.name!r} version {loaded.manifest.version}")
        except LoadError as error:
            version.state, version.reason = "UNAVAILABLE", str(error)
            logger.error("model %s version %d can't be served: %s", version.name, version.number, error)
            return
        except Exception:
            version.state, version.reason = "UNAVAILABLE", "it failed to load; the server's log says why"
            logger.exception("model %s version %d failed to load", version.name, version.number)
            return
        version.model = ServedModel(loaded, self._monitor(version, loaded))
        version.state, version.reason = "READY", loaded.note
        self._tell(version.name)

    def _monitor(self, version: Version, loaded: Loaded) -> ModelMonitor:
        labels = (version.name, str(version.number))
        engine, metrics, manifest = loaded.runner.fast, self._metrics, loaded.manifest
        digest = manifest.files["weights.safetensors"].sha256[:8]
        metrics.model_info.labels(*labels, engine.name, engine.device, digest).set(1)
        metrics.model_ready.labels(*labels).set(1)
        metrics.load_duration.labels(*labels).set(loaded.load_seconds)
        metrics.memory.labels(*labels, engine.device).set(loaded.memory_bytes)
        return ModelMonitor(metrics, *labels, engine.device, loaded.limits)

    def _tell(self, name: str) -> None:
        for listener in self._listeners:
            listener(name, self._newest(name) is not None)


def scan(root: Path) -> list[tuple[str, int]]:
    """Return (name, version) of every artefact below `root`; StartError when there is no such folder or it holds none.

    Only plain names count, a version directory is a positive number without leading zeros, and a directory without a
    manifest is one that is still being written.
    """
    if not root.is_dir():
        raise StartError(
            f"the repository {str(root)!r} is not a folder; make one with `layercast export --all --output DIR`"
        )
    found = []
    for model in sorted(root.iterdir()):
        if _NAME.match(model.name) and model.is_dir() and model.resolve().is_relative_to(root.resolve()):
            numbers = [entry.name for entry in model.iterdir() if _VERSION.match(entry.name)]
            found += [(model.name, int(n)) for n in sorted(numbers, key=int) if (model / n / MANIFEST_FILE).is_file()]
    if not found:
        raise StartError(f"the repository {str(root)!r} holds no model; want MODEL/VERSION/{MANIFEST_FILE} in it")
    return found
