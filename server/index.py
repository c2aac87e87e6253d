"""The index of model versions: which there are, in what state, and which one answers a request. It does no I/O."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

from layercast.proto.codec import quoted
from layercast.server import disk
from layercast.server.errors import InvalidArgument, NotFound, ServingError, Unavailable
from layercast.server.layers import near
from layercast.server.model import ServedModel

State = Literal["LOADING", "READY", "UNLOADING", "UNAVAILABLE"]

UNLOADED: Final = "unloaded"
"""The reason of a version that was unloaded on purpose; Triton's clients look for this word."""


@dataclass(eq=False)
class Version:
    """One version in the index. `model` answers while there is one, also while a newer copy of it loads or has failed.

    `reason` says why the version does not answer, or why what is on disk now does not, which `failed` tells. `mark` is
    that of the directory that was last tried.
    """

    name: str
    number: int
    state: State = "LOADING"
    reason: str = ""
    model: ServedModel | None = None
    failed: bool = False
    mark: str = ""
    leaving: int = 0
    """How many models that answered for this version still answer what they had admitted."""


class Index:
    """Versions by model and number, and who is told when a model becomes ready or stops being so."""

    def __init__(self) -> None:
        self._models: dict[str, dict[int, Version]] = {}
        self._counted_on: set[str] = set()
        self._listeners: list[Callable[[str, bool], None]] = []
        self._started = False
        self._stopping = False

    def listen(self, listener: Callable[[str, bool], None]) -> None:
        """Call `listener(model, ready)` whenever a model becomes ready, stops being so, or is counted on no more."""
        self._listeners.append(listener)

    @property
    def ready(self) -> bool:
        """Whether the start has ended, no shutdown has begun, and every model that is counted on has an answer.

        Counted on are the models found at the start and those that have answered since, but not what was unloaded
        on purpose: a model that is added later and fails takes nothing from anybody.
        """
        return self._started and not self._stopping and all(self._newest(name) for name in self._counted_on)

    def versions(self) -> list[Version]:
        """Return every version known, by name and number."""
        return [versions[number] for _, versions in sorted(self._models.items()) for number in sorted(versions)]

    def find(self, name: str, version: str) -> ServedModel:
        """Return the model that answers for `name` and `version` ("" for the highest ready version).

        Raises NotFound for an unknown model or version, InvalidArgument for a version that is no number, Unavailable
        for one that is known but not ready.
        """
        model = self.ready_model(name, version)
        if model is None:
            raise self._not_ready(name, version)
        return model

    def ready_model(self, name: str, version: str) -> ServedModel | None:
        """Return the model that `find` returns, None where that raises."""
        if not version:
            return self._newest(name)
        entry = self._models.get(name, {}).get(int(version)) if disk.is_version(version) else None
        return entry.model if entry else None

    def _newest(self, name: str) -> ServedModel | None:
        newest, found = 0, None
        for number, version in self._models.get(name, {}).items():
            if version.model and number > newest:
                newest, found = number, version.model
        return found

    def _not_ready(self, name: str, version: str) -> ServingError:
        versions = self._models.get(name)
        if versions is None:
            return self._unknown(name)
        if not version:
            why = self._why(versions)
            return Unavailable(f"model {name!r} has no ready version: {why}", retry_after=_retry(*versions.values()))
        if not disk.is_version(version):
            return InvalidArgument(
                f"model_version must be a positive whole number without leading zeros, got {quoted(version)}",
                field="model_version",
            )
        entry = versions.get(int(version))
        if entry is None:
            known = ", ".join(str(number) for number in sorted(versions))
            return NotFound(f"model {name!r} has no version {version}; known: {known}", field="model_version")
        return Unavailable(
            f"version {version} of model {name!r} is not ready: {entry.reason or entry.state.lower()}",
            retry_after=_retry(entry),
        )

    @staticmethod
    def _why(versions: dict[int, Version]) -> str:
        return "; ".join(f"version {v.number}: {v.reason or v.state.lower()}" for v in versions.values())

    def _unknown(self, name: str) -> ServingError:
        known = near(name[:128], sorted(self._models))
        if not name:
            return InvalidArgument(f"model_name is empty; {known}", field="model_name")
        return NotFound(f"Request for unknown model: {quoted(name)}; {known}", field="model_name")

    def _tell(self, name: str) -> None:
        for listener in self._listeners:
            listener(name, self._newest(name) is not None)


def _retry(*versions: Version) -> float | None:
    """Return after how many seconds to try again: soon while one loads, never said when none does."""
    return 1.0 if any(version.state == "LOADING" for version in versions) else None
