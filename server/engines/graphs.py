"""CUDA graphs: a forward recorded once for each size of batch and replayed, without Python and launch by launch.

For models of many small layers, which launch slower than a card computes.
"""

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import numpy as np
import torch
from torch import Tensor

from layercast.models.artefact import to_numpy
from layercast.models.examples import Examples
from layercast.models.manifest import TensorSpec
from layercast.server.engines.base import Inputs
from layercast.server.engines.choice import Buckets, length_in
from layercast.server.engines.place import Graph, OnCard, Tensors

_WARM: Final = 3
"""Forwards before a capture, in which libraries choose their kernels and take their workspaces."""


_ROWS: Final = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128)
"""Sizes of graphs. Steps of a half bound what spare rows cost; larger batches compute longer than they launch."""


class NotCaptured(Exception):
    """A model's forward can't be recorded; the text says why."""


class Graphs:
    """The graphs of one instance of a model, a batch of which runs on the smallest that has room for it."""

    def __init__(self, graphs: Mapping[tuple[int, int], Graph], buckets: Buckets, specs: Sequence[TensorSpec]) -> None:
        self._graphs = graphs
        self._buckets = buckets
        self._rows_of = specs[0].name
        self._length_of = length_in(specs)

    def fitting(self, inputs: Inputs) -> Graph | None:
        """Return the graph for a batch of the size of `inputs`; None for one that is larger than all."""
        rows = bisect_left(self._buckets.rows, len(inputs[self._rows_of]))
        length = bisect_left(self._buckets.lengths, self._length_of(inputs))
        if rows == len(self._buckets.rows) or length == len(self._buckets.lengths):
            return None
        return self._graphs[self._buckets.lengths[length], self._buckets.rows[rows]]


def capture(
    place: OnCard,
    forward: Callable[[Tensors], dict[str, Tensor]],
    specs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    buckets: Buckets,
    agree: Callable[[Mapping[str, np.ndarray], Mapping[str, np.ndarray]], bool],
) -> Graphs:
    """Record `forward` for batches of `buckets`, in finer steps and up to 128 rows.

    Each graph must reproduce, as far as `agree` wants, the outputs of other inputs than it was recorded with.
    NotCaptured when a forward can't be recorded, or its graph gives other outputs: then it computes on the host with
    what it is given, and a graph would repeat what came of the values it was recorded with.
    """
    _check_sizes(specs, outputs)
    card, graphs = place.card, {}
    most = min(buckets.rows[-1], _ROWS[-1])
    buckets = Buckets((*(rows for rows in _ROWS if rows < most), most), buckets.lengths)
    # One stream and one pool, the largest first: a graph then needs no memory beside that of those before. They never
    # run at the same time, and what one gave is fetched before the next runs.
    stream, pool = card.capture_stream(), card.pool()
    try:
        for length in reversed(buckets.lengths):
            static = _on_card(Examples(specs).make(buckets.rows[-1], length, "low"), place)
            for rows in reversed(buckets.rows):
                own = {name: tensor[:rows] for name, tensor in static.items()}
                with torch.inference_mode():
                    card.synchronize()
                    with card.on(stream):
                        for _ in range(_WARM):
                            forward(own)
                    card.synchronize()
                    handle, results = card.capture(lambda own=own: forward(own), stream, pool)  # type: ignore[misc]
                graphs[length, rows] = Graph(rows, length, own, results, handle)
        for graph in graphs.values():
            _check(graph, place, forward, specs, agree)
    except NotCaptured:
        raise
    except Exception as error:  # whatever a model does that a card can't record
        lines = str(error).strip().splitlines()
        raise NotCaptured(f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]) from error
    return Graphs(graphs, buckets, specs)


def _check_sizes(specs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> None:
    for spec in specs:
        free = spec.dynamic_dimensions()
        if free and (free != (1,) or spec.pad is None):
            raise NotCaptured(f"input {spec.name!r} has dimensions of any size that can't be padded")
    if any(spec.dynamic_dimensions() for spec in outputs):
        raise NotCaptured("outputs have dimensions of any size")


def _on_card(examples: Mapping[str, Tensor], place: OnCard) -> dict[str, Tensor]:
    with torch.inference_mode():
        return {name: tensor.to(place.device) for name, tensor in examples.items()}


def _check(
    graph: Graph,
    place: OnCard,
    forward: Callable[[Tensors], dict[str, Tensor]],
    specs: Sequence[TensorSpec],
    agree: Callable[[Mapping[str, np.ndarray], Mapping[str, np.ndarray]], bool],
) -> None:
    inputs = {name: to_numpy(tensor) for name, tensor in Examples(specs).make(graph.rows, graph.length).items()}
    if not agree(place.replay(graph, inputs), place.run(inputs, forward)):
        raise NotCaptured(f"the graph of {graph.rows} rows gives other outputs than the module")
