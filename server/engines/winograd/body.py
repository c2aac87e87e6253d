"""Finds the convolutional body of an ONNX program: a run of convolutions that one library call can compute."""

from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from layercast.models.onnx_cut import needed_for, parsed

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto

Floats = NDArray[np.float32]

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


def body_of(content: bytes) -> Body | None:
    """Return the body of the program in `content` with most to save; None where nothing is. CutError for no program."""
    graph = parsed(content).graph
    reader = _Reader(graph)
    found: list[Body] = []
    for node in graph.node:
        known = node.input[0] if reader.convolution(node) else ""
        if known and not any(known in (body.start, *(step.target for step in body.steps)) for body in found):
            found.append(_usable(graph, reader.run_from(known)))
    best = max(found, key=lambda body: body.worth, default=None)
    return best if best and best.worth else None


def _usable(graph: "GraphProto", body: Body) -> Body:
    """Return the longest part of `body` of which only the end is used by the rest of the program; it may be empty."""
    outputs = [output.name for output in graph.output]
    for length in range(len(body.steps), 0, -1):
        steps = _needed(body.steps[:length])
        end = steps[-1].target
        if end in outputs and outputs[1:]:
            continue  # the rest of a program can't give what it is given
        if needed_for(graph, outputs, end).isdisjoint({step.target for step in steps} - {end}):
            return Body(body.start, end, steps)
    return Body(body.start, body.start, ())


def _needed(steps: tuple[Convolution, ...]) -> tuple[Convolution, ...]:
    """Return those of the steps that the last one needs."""
    wanted, needed = {steps[-1].target}, []
    for step in reversed(steps):
        if step.target in wanted:
            wanted |= {step.source, step.shortcut}
            needed.append(step)
    return tuple(reversed(needed))


class _Reader:
    """Reads runs of convolutions off a graph."""

    def __init__(self, graph: "GraphProto") -> None:
        from onnx import TensorProto, numpy_helper

        self._graph = graph
        self._uses = Counter(name for node in graph.node for name in node.input)
        self._uses.update(output.name for output in graph.output)
        self._weights = {w.name: w for w in graph.initializer if w.data_type == TensorProto.FLOAT}
        self._to_array = numpy_helper.to_array

    def convolution(self, node: "NodeProto") -> Convolution | None:
        """Return the convolution that `node` is, if it is one that can be computed."""
        if node.op_type != "Conv" or node.domain or not set(node.input[1:]) <= self._weights.keys():
            return None
        weights = self._array(node.input[1])
        if weights.ndim != 4 or weights.shape[2] != weights.shape[3] or weights.shape[2] not in _PADDING:
            return None
        says = _attributes(node)
        strides = says.get("strides", [1, 1])
        plain = (
            says.get("group", 1) == 1
            and says.get("dilations", [1, 1]) == [1, 1]
            and says.get("auto_pad", b"NOTSET") == b"NOTSET"
            and says.get("pads", [0, 0, 0, 0]) == _PADDING[weights.shape[2]]
            and strides in ([1, 1], [2, 2])
        )
        bias = self._array(node.input[2]) if len(node.input) > 2 else np.zeros(len(weights), np.float32)
        return Convolution(node.input[0], node.output[0], weights, bias, strides[0]) if plain else None

    def run_from(self, start: str) -> Body:
        """Return all convolutions that follow from `start`, each with the sum and the ReLU after it."""
        steps: list[Convolution] = []
        made: dict[str, int] = {start: -1}
        for node in self._graph.node:
            if node.domain or not node.input:
                continue
            if node.input[0] in made and (step := self.convolution(node)):
                made[step.target] = len(steps)
                steps.append(step)
            elif fused := self._fused(node, steps, made):
                at, step = fused
                del made[steps[at].target]
                steps[at] = step
                made[step.target] = at
        return Body(start, steps[-1].target, tuple(steps))

    def _fused(
        self, node: "NodeProto", steps: list[Convolution], made: dict[str, int]
    ) -> tuple[int, Convolution] | None:
        """Return which convolution takes `node` on, and what it is then."""
        if not set(node.input) <= made.keys():
            return None
        at = max(made[name] for name in node.input)
        if at < 0 or self._uses[steps[at].target] != 1 or steps[at].relu:
            return None
        step = replace(steps[at], target=node.output[0])
        if node.op_type == "Relu":
            return at, replace(step, relu=True)
        if node.op_type == "Add" and not step.shortcut:
            (other,) = (name for name in node.input if made[name] != at)
            return at, replace(step, shortcut=other)
        return None

    def _array(self, name: str) -> Floats:
        return np.asarray(self._to_array(self._weights[name]), np.float32)


def _attributes(node: "NodeProto") -> dict[str, Any]:
    from onnx import helper

    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
