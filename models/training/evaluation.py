"""Measures a model on its data set's test part: from the zoo, from a repository of artefacts, or on a server."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import torch
from torch import Tensor, nn

from layercast.models import zoo
from layercast.models.artefact import load_module, module_from_card
from layercast.models.card import Card
from layercast.models.data import Dataset
from layercast.models.manifest import MANIFEST_FILE, Manifest
from layercast.models.training.measure import confusion_matrix, figures, logits_of
from layercast.models.training.recipes import Recipe
from layercast.proto.codec import decode_outputs, fill_inputs
from layercast.proto.messages import ModelInferRequest, ModelMetadataRequest, ModelMetadataResponse
from layercast.proto.rpc import INFERENCE

_BATCH = 64


class EvaluationError(ValueError):
    """A model cannot be measured; the text is one line with the cause."""


@dataclass(frozen=True)
class Subject:
    """A model to measure: which it is, what it says about itself, and its forward, prepared rows to logits [N, C].

    `claimed` is the accuracy that its card states, None where it states none.
    """

    name: str
    version: str
    where: str
    labels: tuple[str, ...]
    preprocessing: Mapping[str, Any]
    claimed: float | None
    forward: Callable[[Tensor], Tensor]


def from_zoo(name: str) -> Subject:
    """Return the model of the zoo called `name`; ValueError when there is none or its files are wrong."""
    folder = zoo.directory(name)
    return _offline(Card.read(folder), str(zoo.VERSION), "the zoo", module_from_card(folder))


def from_repository(repository: Path, name: str, version: int | None) -> Subject:
    """Return the artefact REPOSITORY/NAME/VERSION, the newest one for None; ValueError when there is none."""
    folder = repository / name
    versions = sorted(
        int(path.parent.name) for path in folder.glob(f"*/{MANIFEST_FILE}") if path.parent.name.isdecimal()
    )
    if not versions:
        raise EvaluationError(f"{folder}: no version with a {MANIFEST_FILE}; export the model first")
    chosen = versions[-1] if version is None else version
    if chosen not in versions:
        raise EvaluationError(f"{folder}: no version {chosen}; there is {', '.join(map(str, versions))}")
    manifest = Manifest.read(folder / str(chosen))
    return _offline(manifest, str(chosen), str(repository), load_module(folder / str(chosen), manifest))


def _offline(said: Card | Manifest, version: str, where: str, module: nn.Module) -> Subject:
    def forward(rows: Tensor) -> Tensor:
        with torch.inference_mode():
            logits: Tensor = module(rows)
        return logits

    accuracy = said.metrics.get("accuracy")
    claimed = float(accuracy) if isinstance(accuracy, int | float) else None
    return Subject(said.name, version, where, said.labels, said.preprocessing or {}, claimed, forward)


@contextmanager
def on_server(url: str, name: str, version: int | None, timeout: float = 60.0) -> Iterator[Subject]:
    """Yield the model as a running server at `url` (HOST:PORT) answers for it; EvaluationError for its errors.

    Speaks the protocol itself: `models` stands below the client and does not import it.
    """
    asked = "" if version is None else str(version)
    # A proxy from the environment cannot reach this machine's loopback address.
    proxy = not url.startswith(("localhost", "127.", "[::1]"))
    options = [("grpc.max_receive_message_length", -1), ("grpc.enable_http_proxy", int(proxy))]
    with grpc.insecure_channel(url, options) as channel:

        def call(rpc: str, request: Any) -> Any:
            method = INFERENCE[rpc]
            stub = channel.unary_unary(method.path, method.request.SerializeToString, method.response.FromString)
            try:
                return stub(request, timeout=timeout)
            except grpc.RpcError as error:
                raise EvaluationError(f"{url}: {error.code().name}: {error.details()}") from error

        metadata: ModelMetadataResponse = call("ModelMetadata", ModelMetadataRequest(name=name, version=asked))
        if len(metadata.inputs) != 1 or len(metadata.outputs) != 1:
            raise EvaluationError(
                f"{name}: want a model of one input and one output, "
                f"got {len(metadata.inputs)} and {len(metadata.outputs)}"
            )
        given = metadata.inputs[0]

        def forward(rows: Tensor) -> Tensor:
            request = ModelInferRequest(model_name=name, model_version=asked)
            fill_inputs(request, [(given.name, given.datatype, rows.contiguous().numpy())])
            (logits,) = decode_outputs(call("ModelInfer", request)).values()
            return torch.from_numpy(logits.copy())

        served = asked or max(metadata.versions, key=int, default="")
        labels, preprocessing = (
            json.loads(metadata.properties.get(key, "null")) for key in ("labels", "preprocessing")
        )
        yield Subject(name, served, url, tuple(labels or ()), preprocessing or {}, None, forward)


def recipe_for(recipe: Recipe, subject: Subject) -> Recipe:
    """Return `recipe` with the text length that `subject` takes, so that its data are cut as the model wants."""
    length = subject.preprocessing.get("max_length")
    return recipe if length is None else replace(recipe, arguments={**recipe.arguments, "max_length": length})


def measure(subject: Subject, recipe: Recipe, data: Dataset) -> dict[str, Any]:
    """Return accuracy, the figures of every class and the confusion matrix of `subject` on the test part of `data`."""
    if subject.labels != data.labels:
        raise EvaluationError(
            f"{subject.name}: want a model of the classes {', '.join(data.labels)}, got {', '.join(subject.labels)}"
        )
    logits = logits_of(lambda rows: subject.forward(recipe.prepare(rows)), data.test_inputs, _BATCH)
    if logits.shape[1:] != (len(data.labels),):
        raise EvaluationError(f"{subject.name}: want logits [N, {len(data.labels)}], got {list(logits.shape)}")
    return figures(confusion_matrix(logits.argmax(dim=1), data.test_targets, len(data.labels)), data.labels)
