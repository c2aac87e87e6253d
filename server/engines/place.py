"""Where a model computes: brings a batch there, runs it, brings the results back. On the host or on a card."""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from layercast.models.artefact import to_numpy
from layercast.models.datatypes import TORCH_DTYPES
from layercast.models.manifest import TensorSpec
from layercast.server.engines import cuda
from layercast.server.engines.base import Inputs
from layercast.server.engines.tensors import to_tensors
from layercast.server.work import Array

K = TypeVar("K", bound=Hashable)
Tensors = Mapping[str, Tensor]

_ALIGNED: Final = 64


class Place(Protocol):
    """`kind` is what engines call it (`cpu`, `cuda`), `device` where tensors are."""

    kind: str
    device: torch.device

    def run(self, inputs: Inputs, forward: Callable[[Tensors], Mapping[K, Tensor]]) -> dict[K, Array]:
        """Return what `forward` gives for the batch `inputs`, in memory of its own. Called by one thread at a time."""


def at(device: torch.device, specs: Sequence[TensorSpec]) -> Place:
    """Return a new place on `device` for batches of the inputs `specs`."""
    return OnHost(specs) if device.type == "cpu" else OnCard(cuda.Card(device.index or 0), specs)


class OnHost:
    """On the processors."""

    kind = "cpu"
    device = torch.device("cpu")

    def __init__(self, specs: Sequence[TensorSpec]) -> None:
        self._specs = specs

    def run(self, inputs: Inputs, forward: Callable[[Tensors], Mapping[K, Tensor]]) -> dict[K, Array]:
        """Return what `forward` gives for the batch `inputs`."""
        with torch.inference_mode():
            results = forward(to_tensors(inputs, self._specs, self.device))
            return {key: to_numpy(tensor) for key, tensor in results.items()}


@dataclass(frozen=True)
class Graph:
    """A forward that was recorded for just so many rows of such a length (0 where no length is free).

    It reads `inputs` and writes `outputs`, which stay where they are.
    """

    rows: int
    length: int
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    handle: Any


class OnCard:
    """On a CUDA device, through page-locked memory, with a stream for copies to the card and one that computes.

    Instances on the same card so copy and compute beside each other. `computing` is the stream that computes.
    """

    kind = "cuda"

    def __init__(self, card: cuda.Card, specs: Sequence[TensorSpec]) -> None:
        self.card = card
        self.device = card.device
        self.computing = card.stream()
        self._copying = card.stream()
        self._specs = specs
        self._sent = {spec.name: _Pinned(card) for spec in specs}
        self._back = _Pinned(card)
        self._done: Any = None

    def run(self, inputs: Inputs, forward: Callable[[Tensors], Mapping[K, Tensor]]) -> dict[K, Array]:
        """Return what `forward` gives for the batch `inputs`."""
        with torch.inference_mode():
            staged = {spec.name: self._stage(spec, inputs[spec.name]) for spec in self._specs}
            with self.card.on(self._copying):
                tensors = {name: torch.empty_like(own, device=self.device) for name, own in staged.items()}
                self._send(staged, tensors)
            for tensor in tensors.values():
                self.card.keep(tensor, self.computing)
            with self.card.on(self.computing):
                return self._fetch(forward(tensors))

    def replay(self, graph: Graph, inputs: Inputs) -> dict[str, Array]:
        """Return the outputs of `graph` for a batch that it has room for.

        The rows that it has too many repeat the first one, so that nothing computes with what is no valid input.
        """
        rows = len(inputs[self._specs[0].name])
        with torch.inference_mode():
            staged = {spec.name: self._stage(spec, inputs[spec.name], graph) for spec in self._specs}
            with self.card.on(self._copying):
                if self._done is not None:  # until then the last batch may read its inputs
                    self.card.wait(self._copying, self._done)
                self._send(staged, graph.inputs)
            with self.card.on(self.computing):
                self.card.replay(graph.handle)
                return self._fetch({name: output[:rows] for name, output in graph.outputs.items()})

    def _stage(self, spec: TensorSpec, array: Array, graph: Graph | None = None) -> Tensor:
        """Copy `array` into page-locked memory, padded to the size of `graph` where there is one."""
        shape = array.shape if graph is None else tuple(graph.inputs[spec.name].shape)
        dtype = TORCH_DTYPES[spec.datatype]
        staged = self._sent[spec.name].hold([(shape, dtype)])[0]
        own = staged[: len(array)]
        if spec.datatype == "BF16":  # comes as float32, since numpy has no such type
            own.copy_(torch.from_numpy(array.copy()))
        else:
            values = own.numpy()
            if array.shape[1:] != shape[1:]:
                values[:, array.shape[1] :] = spec.pad
                values = values[:, : array.shape[1]]
            np.copyto(values, array, casting="equiv")
        if len(own) < len(staged):
            staged[len(own) :] = staged[0]
        return staged

    def _send(self, staged: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
        """Queue the copies to the card; what is queued to compute from now on waits for them."""
        try:
            for name, own in staged.items():
                self.card.copy(tensors[name], own)
        finally:
            sent = self.card.record(self._copying)
            for name in staged:
                self._sent[name].busy = sent
        self.card.wait(self.computing, sent)

    def _fetch(self, results: Mapping[K, Tensor]) -> dict[K, Array]:
        """Return results in memory of their own, when they are there."""
        held = self._back.hold([(tuple(tensor.shape), tensor.dtype) for tensor in results.values()])
        try:
            for tensor, own in zip(results.values(), held, strict=True):
                self.card.copy(own, tensor)
        finally:
            self._done = self._back.busy = self.card.record(self.computing)
        self.card.finish(self._done)
        self._back.busy = None
        # What is BF16 becomes float32, which is a copy already.
        mine = [own if own.dtype == torch.bfloat16 else own.clone() for own in held]
        return {key: to_numpy(own) for key, own in zip(results, mine, strict=True)}


class _Pinned:
    """Page-locked memory that is used again. `busy` is the event after which the card is done with it."""

    def __init__(self, card: cuda.Card) -> None:
        self.busy: Any = None
        self._card = card
        self._memory = card.pinned(0)

    def hold(self, tensors: Sequence[tuple[tuple[int, ...], torch.dtype]]) -> list[Tensor]:
        """Return room for tensors of these shapes and dtypes, once the card is done with what was here."""
        if self.busy is not None:
            self._card.finish(self.busy)
            self.busy = None
        sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in tensors]
        starts = [0]
        for size in sizes:
            starts.append(starts[-1] + -(-size // _ALIGNED) * _ALIGNED)
        if starts[-1] > self._memory.numel():
            self._memory = self._card.pinned(starts[-1])
        return [
            self._memory[start : start + size].view(dtype).view(shape)
            for start, size, (shape, dtype) in zip(starts, sizes, tensors, strict=False)
        ]
