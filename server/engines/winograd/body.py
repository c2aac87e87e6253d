"""Finds the convolutional body of an ONNX program: a run of convolutions that one library call can compute."""

from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from layercast.models.onnx_cut import CutError, parsed, read

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto

Floats = NDArray[np.float32]

_PADDING: Final = {1: [0, 0, 0, 0], 3: [1, 1, 1, 1]}
"""Of each kernel that is computed, all around: with stride 1, what comes out is as large as what goes in."""


_MOST_STARTS: Final = 64
"""Runs that are looked at: of each, all that follows is."""


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


def body_of(content: bytes, panel: int) -> Body | None:
    """Return the body of the program in `content` with most to save, None where nothing is.

    Of convolutions to a multiple of `panel` channels. CutError for no program, and one whose values share a name.
    """
    reader = _Reader(parsed(content).graph, panel)
    found: list[Body] = []
    inside: set[str] = set()
    for start in reader.starts:
        if start in inside or len(found) == _MOST_STARTS:
            continue
        body = reader.usable(reader.run_from(start))
        inside.update(step.target for step in body.steps[:-1])
        found.append(body)
    best = max(found, key=lambda body: body.worth, default=None)
    return best if best and best.worth else None


class _Reader:
    """Reads runs of convolutions off a graph."""

    def __init__(self, graph: "GraphProto", panel: int) -> None:
        from onnx import TensorProto, numpy_helper

        self._graph = graph
        self._panel = panel
        self._outputs = [output.name for output in graph.output]
        given = {value.name for value in graph.input}
        made = [name for node in graph.node for name in node.output if name]
        every = [*given, *made, *(weight.name for weight in graph.initializer)]
        if len(set(every)) != len(every):
            raise CutError("values share a name")
        self._uses = Counter(name for node in graph.node for name in read(node))
        self._uses.update(self._outputs)
        self._weights = {w.name: w for w in graph.initializer if w.data_type == TensorProto.FLOAT}
        self._to_array = numpy_helper.to_array
        self._convolutions = {node.output[0]: step for node in graph.node if (step := self._convolution(node))}

    @property
    def starts(self) -> list[str]:
        """What convolutions begin with, in order."""
        return list(dict.fromkeys(step.source for step in self._convolutions.values()))

    def usable(self, body: Body) -> Body:
        """Return the longest part of `body` of which the rest of the program uses only the end; it may be empty."""
        open_uses: dict[str, int] = {}
        length = 0
        for at, step in enumerate(body.steps):
            for name in (step.source, step.shortcut):
                if name in open_uses:
                    open_uses[name] -= 1
            open_uses[step.target] = self._uses[step.target]
            open_uses = {name: uses for name, uses in open_uses.items() if uses}
            # The rest of a program can't give what it is given.
            passed_on = step.target in self._outputs and len(self._outputs) > 1
            if set(open_uses) == {step.target} and not passed_on:
                length = at + 1
        steps = body.steps[:length]
        return Body(body.start, steps[-1].target if steps else body.start, steps)

    def _convolution(self, node: "NodeProto") -> Convolution | None:
        """Return the convolution that `node` is, if it is one that can be computed."""
        wanted = node.op_type == "Conv" and not node.domain and len(node.input) in (2, 3) and len(node.output) == 1
        if not wanted or not node.output[0] or not set(node.input[1:]) <= self._weights.keys():
            return None
        dims = list(self._weights[node.input[1]].dims)
        if len(dims) != 4 or dims[2] != dims[3] or dims[2] not in _PADDING or not dims[1] or not dims[0]:
            return None
        if len(node.input) > 2 and list(self._weights[node.input[2]].dims) != dims[:1]:
            return None
        if dims[0] % self._panel or not _is_plain(node, dims[2]):
            return None
        bias = self._array(node.input[2]) if len(node.input) > 2 else np.zeros(dims[0], np.float32)
        strides = _attributes(node).get("strides", [1, 1])
        return Convolution(node.input[0], node.output[0], self._array(node.input[1]), bias, strides[0])

    def run_from(self, start: str) -> Body:
        """Return all convolutions that follow from `start`, each with the sum and the ReLU after it."""
        steps: list[Convolution] = []
        made: dict[str, int] = {start: -1}
        for node in self._graph.node:
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
        if node.op_type == "Relu" and len(node.input) == 1:
            return at, replace(step, relu=True)
        if node.op_type == "Add" and not step.shortcut and len(node.input) == 2:
            (other,) = (name for name in node.input if made[name] != at)  # its target is used once, so there is one
            return at, replace(step, shortcut=other)
        return None

    def _array(self, name: str) -> Floats:
        return np.asarray(self._to_array(self._weights[name]), np.float32)


def _is_plain(node: "NodeProto", kernel: int) -> bool:
    """Tell whether a convolution of that kernel is like those that are computed in everything else."""
    says = _attributes(node)
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


def _attributes(node: "NodeProto") -> dict[str, Any]:
    from onnx import helper

    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
