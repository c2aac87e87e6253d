"""The protocol's model control: the index of the repository, loading and unloading."""

from collections.abc import Iterable

from layercast.proto.codec import quoted
from layercast.proto.messages import (
    RepositoryIndexRequest,
    RepositoryIndexResponse,
    RepositoryModelLoadRequest,
    RepositoryModelLoadResponse,
    RepositoryModelUnloadRequest,
    RepositoryModelUnloadResponse,
)
from layercast.server.errors import InvalidArgument, PermissionDenied, Unimplemented
from layercast.server.repository import Repository
from layercast.server.service.call import Call


class ModelControl:
    """Answers the RPCs RepositoryIndex, RepositoryModelLoad and RepositoryModelUnload.

    The last two only where the operator has `allowed` them, and only for what is on the server's disk: nothing is
    ever fetched, and no file or configuration is taken from a request.
    """

    def __init__(self, repository: Repository, *, allowed: bool) -> None:
        self._repository = repository
        self._allowed = allowed

    async def repository_index(self, request: RepositoryIndexRequest, call: Call) -> RepositoryIndexResponse:
        """Every version with its state, and the reason where it, or what is on disk now, does not answer."""
        if request.repository_name:
            raise Unimplemented(
                "there is one repository and it has no name; leave repository_name empty", field="repository_name"
            )
        entries = [v for v in self._repository.versions() if v.model or not request.ready]
        return RepositoryIndexResponse(
            models=[
                RepositoryIndexResponse.ModelIndex(name=v.name, version=str(v.number), state=v.state, reason=v.reason)
                for v in entries
            ]
        )

    async def repository_model_load(
        self, request: RepositoryModelLoadRequest, call: Call
    ) -> RepositoryModelLoadResponse:
        """Load what is new or changed in a model's folder; returns when it serves, or says why it can't."""
        name = self._name(request)
        _refuse(request.parameters, known=())
        await self._repository.load(name)
        return RepositoryModelLoadResponse.FromString(_kserve(request))

    async def repository_model_unload(
        self, request: RepositoryModelUnloadRequest, call: Call
    ) -> RepositoryModelUnloadResponse:
        """Unload a model; returns when it takes no new requests, those admitted are still answered."""
        name = self._name(request)
        _refuse(request.parameters, known=("unload_dependents",))
        await self._repository.unload(name)
        return RepositoryModelUnloadResponse.FromString(_kserve(request))

    def _name(self, request: RepositoryModelLoadRequest | RepositoryModelUnloadRequest) -> str:
        """Return the model's name; KServe's client sends it in the field that is the repository's name here."""
        if not self._allowed:
            raise PermissionDenied(
                "explicit model load / unload is not allowed; start the server with --model-control explicit"
            )
        if request.model_name and request.repository_name:
            raise Unimplemented(
                "there is one repository and it has no name; leave repository_name empty", field="repository_name"
            )
        return request.model_name or request.repository_name


def _refuse(parameters: Iterable[str], known: Iterable[str]) -> None:
    for key in parameters:
        if key == "config" or key.startswith("file:"):
            raise Unimplemented(
                f"parameter {quoted(key)}: models are loaded as they are on the server's disk; put the files or the "
                "model's layercast.toml there",
                field="parameters",
            )
        if key not in known:
            raise InvalidArgument(f"parameter {quoted(key)} is not known here", field="parameters")


def _kserve(request: RepositoryModelLoadRequest | RepositoryModelUnloadRequest) -> bytes:
    """Return the answer's bytes: none, but KServe's has the name and whether it was done, as fields 1 and 2.

    A request for the index has a string and a bool there.
    """
    if request.model_name:
        return b""
    return RepositoryIndexRequest(repository_name=request.repository_name, ready=True).SerializeToString()
