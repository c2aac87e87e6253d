"""Finds the convolutional body of an ONNX program: a run of convolutions that one library call can compute."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import numpy as np

from layercast.server.engines.native.graph import Graph, attributes
from layercast.server.engines.native.memory import Floats

if TYPE_CHECKING:
    from onnx import NodeProto

_PADDING: Final = {1: [0, 0, 0, 0], 3: [1, 1, 1, 1]}
"""Of each kernel that is computed, all around: with stride 1, what comes out is as large as what goes in."""


@dataclass(frozen=True, eq=False)
class Convolution:
    """A convolution, and the sum and the ReLU that follow it; values are named as in the program.

    `weights` are [out, in, kernel, kernel], `bias` [out]; `shortcut`, unless "", is added before the ReLU.
    """

    source: str
    target: str
    weights: Floats
    bias: Floats
    stride: int
    shortcut: str = ""
    relu: bool = False

    @property
    def reads(self) -> tuple[str, ...]:
        """See `Step`."""
        return (self.source, self.shortcut) if self.shortcut else (self.source,)

    @property
    def kernel(self) -> int:
        """The kernel's height, and its width."""
        return int(self.weights.shape[2])

    @property
    def by_tiles(self) -> bool:
        """Whether Winograd's algorithm has a tile for it."""
        return self.kernel == 3 and self.stride == 1


@dataclass(frozen=True)
class Body:
    """Convolutions that compute the value `end` from the value `start`, and nothing else that is used."""

    start: str
    end: str
    steps: tuple[Convolution, ...]

    @property
    def worth(self) -> int:
        """Multiplications that can be saved, without regard to the sizes of the maps."""
        return sum(step.weights.size for step in self.steps if step.by_tiles)


def body_of(content: bytes, panel: int) -> Body | None:
    """Return the body of the program in `content` with most to save, None where nothing is.

    Of convolutions to a multiple of `panel` channels. CutError for no program, and one whose values share a name.
    """
    graph = Graph(content)
    reader = _Reader(graph, panel)
    found = [Body(start, steps[-1].target, steps) for start, steps in graph.runs(reader.starts, reader.run_from)]
    best = max(found, key=lambda body: body.worth, default=None)
    return best if best and best.worth else None


class _Reader:
    """Reads runs of convolutions off a graph."""

    def __init__(self, graph: Graph, panel: int) -> None:
        self._graph = graph
        self._panel = panel
        self._convolutions = {node.output[0]: step for node in graph.nodes if (step := self._convolution(node))}

    @property
    def starts(self) -> list[str]:
        """What convolutions begin with, in order."""
        return list(dict.fromkeys(step.source for step in self._convolutions.values()))

    def _convolution(self, node: "NodeProto") -> Convolution | None:
        """Return the convolution that `node` is, if it is one that can be computed."""
        wanted = node.op_type == "Conv" and not node.domain and len(node.input) in (2, 3) and len(node.output) == 1
        if not wanted or not node.output[0] or not set(node.input[1:]) <= self._graph.weights.keys():
            return None
        dims = list(self._graph.weights[node.input[1]].dims)
        if len(dims) != 4 or dims[2] != dims[3] or dims[2] not in _PADDING or not dims[1] or not dims[0]:
            return None
        if len(node.input) > 2 and self._graph.dims(node.input[2]) != dims[:1]:
            return None
        if dims[0] % self._panel or not _is_plain(node, dims[2]):
            return None
        bias = self._graph.array(node.input[2]) if len(node.input) > 2 else np.zeros(dims[0], np.float32)
        strides = attributes(node).get("strides", [1, 1])
        return Convolution(node.input[0], node.output[0], self._graph.array(node.input[1]), bias, strides[0])

    def run_from(self, start: str) -> list[Convolution]:
        """Return all convolutions that follow from `start`, each with the sum and the ReLU after it."""
        steps: list[Convolution] = []
        made: dict[str, int] = {start: -1}
        for node in self._graph.nodes:
            if node.domain or not node.input or len(node.output) != 1 or not node.output[0]:
                continue
            if node.input[0] in made and (step := self._convolutions.get(node.output[0])):
                made[step.target] = len(steps)
                steps.append(step)
            elif fused := self._fused(node, steps, made):
                at, step = fused
                del made[steps[at].target]
                steps[at] = step
                made[step.target] = at
        return steps

    def _fused(
        self, node: "NodeProto", steps: list[Convolution], made: dict[str, int]
    ) -> tuple[int, Convolution] | None:
        """Return which convolution takes `node` on, and what it is then."""
        if not set(node.input) <= made.keys():
            return None
        at = max(made[name] for name in node.input)
        if at < 0 or not self._graph.is_used_once(steps[at].target) or steps[at].relu:
            return None
        step = replace(steps[at], target=node.output[0])
        if node.op_type == "Relu" and len(node.input) == 1:
            return at, replace(step, relu=True)
        if node.op_type == "Add" and not step.shortcut and len(node.input) == 2:
            (other,) = (name for name in node.input if made[name] != at)  # its target is used once, so there is one
            return at, replace(step, shortcut=other)
        return None


def _is_plain(node: "NodeProto", kernel: int) -> bool:
    """Tell whether a convolution of that kernel is like those that are computed in everything else."""
    says = attributes(node)
    strides = says.get("strides", [1, 1])
    return bool(
        says.get("group", 1) == 1
        and says.get("dilations", [1, 1]) == [1, 1]
        and says.get("auto_pad", b"NOTSET") == b"NOTSET"
        and says.get("pads", [0, 0, 0, 0]) == _PADDING[kernel]
        and says.get("kernel_shape", [kernel, kernel]) == [kernel, kernel]
        and strides in ([1, 1], [2, 2])
        and all(isinstance(stride, int) for stride in strides)
    )
