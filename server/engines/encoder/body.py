"""Finds the blocks of a transformer encoder in an ONNX program: a run of steps that one library call can compute."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from layercast.server.engines.encoder.steps import AnyStep, Attention, Linear, Norm
from layercast.server.engines.native.graph import Graph, attributes

if TYPE_CHECKING:
    from onnx import NodeProto

_MICROSOFT: Final = "com.microsoft"
"""The domain of ONNX Runtime's own operators. Exports have attention fused to one of them."""
_ATTENTION: Final = frozenset(("num_heads", "scale", "mask_filter_value", "unidirectional", "do_rotary"))
"""Attributes of attention that can be computed, the last two if they say no."""
_HIDDEN: Final = -10000.0
_EPSILON: Final = 1e-5
"""Defaults of operators."""


class Body(NamedTuple):
    """Steps that compute the value `end`, [rows, length, width], from the value `start`, which is so too.

    No value between them is used elsewhere.
    """

    start: str
    end: str
    steps: tuple[AnyStep, ...]

    @property
    def masks(self) -> list[str]:
        """Values from elsewhere that say which tokens are attended to, [rows, length], each once."""
        return self._sides(step.mask for step in self.steps if isinstance(step, Attention))

    @property
    def factors(self) -> list[str]:
        """Values from elsewhere with a number a row, each once."""
        return self._sides(step.factor for step in self.steps if isinstance(step, Attention))

    @property
    def worth(self) -> int:
        """Multiplications a token, but for those of attention; 0 without any attention."""
        attends = any(isinstance(step, Attention) for step in self.steps)
        return sum(step.weights.size for step in self.steps) if attends else 0

    @staticmethod
    def _sides(names: Iterator[str]) -> list[str]:
        return list(dict.fromkeys(name for name in names if name))


def body_of(content: bytes, lanes: int) -> Body | None:
    """Return the body of the program in `content` with most to compute, None where no attention is in any.

    Of widths that are multiples of `lanes`. CutError for no program, and one whose values share a name.
    """
    graph = Graph(content)
    reader = _Reader(graph, lanes)
    found = [Body(start, steps[-1].target, steps) for start, steps in graph.runs(reader.starts, reader.run_from)]
    best = max(found, key=lambda body: body.worth, default=None)
    return best if best and best.worth else None


class _Reader:
    """Reads runs of steps off a graph."""

    def __init__(self, graph: Graph, lanes: int) -> None:
        self._graph = graph
        self._lanes = lanes
        self._steps = {node.output[0]: step for node in graph.nodes if (step := self._step(node))}

    @property
    def starts(self) -> list[str]:
        """What attention, or a norm before it, begins with, in order."""
        return list(dict.fromkeys(step.source for step in self._steps.values() if not isinstance(step, Linear)))

    def run_from(self, start: str) -> list[AnyStep]:
        """Return all steps that follow from `start`."""
        run = _Run(self._graph, start)
        for node in self._graph.nodes:
            step = self._steps.get(node.output[0]) if node.output else None
            if step and step.source in run.made and not run.depends(getattr(step, "mask", "")):
                run.add(step)
            elif not (node.domain == "" and run.fuse(node)):
                run.leave(node)
        return run.steps

    def _step(self, node: "NodeProto") -> AnyStep | None:
        """Return the step that `node` begins, if it is one that can be computed."""
        if not node.output or not node.output[0] or any(node.output[1:]):
            return None
        if (node.domain, node.op_type) == ("", "MatMul"):
            return self._linear(node)
        if (node.domain, node.op_type) == ("", "LayerNormalization"):
            return self._norm(node)
        if (node.domain, node.op_type) == (_MICROSOFT, "Attention"):
            return self._attention(node)
        return None

    def _linear(self, node: "NodeProto") -> Linear | None:
        dims = self._graph.dims(node.input[1]) if len(node.input) == 2 else None
        if dims is None or len(dims) != 2 or not dims[0] or not self._fits(dims[1]):
            return None
        return Linear(node.input[0], node.output[0], self._graph.array(node.input[1]))

    def _norm(self, node: "NodeProto") -> Norm | None:
        says = attributes(node)
        dims = self._graph.dims(node.input[1]) if len(node.input) in (2, 3) else None
        if dims is None or len(dims) != 1 or not self._fits(dims[0]):
            return None
        if says.get("axis", -1) != -1 or says.get("stash_type", 1) != 1:
            return None
        bias = np.zeros(dims, np.float32)
        if len(node.input) == 3:
            if self._graph.dims(node.input[2]) != dims:
                return None
            bias = self._graph.array(node.input[2])
        weights = self._graph.array(node.input[1])
        return Norm(node.input[0], node.output[0], weights, bias, float(says.get("epsilon", _EPSILON)))

    def _attention(self, node: "NodeProto") -> Attention | None:
        source, *constants = node.input[:3]
        mask = node.input[3] if len(node.input) > 3 else ""
        weights, bias = map(self._graph.dims, constants) if len(constants) == 2 else (None, None)
        says = attributes(node)
        if weights is None or len(weights) != 2 or bias != weights[1:] or any(node.input[4:]):
            return None
        if not says.keys() <= _ATTENTION or says.get("unidirectional") or says.get("do_rotary"):
            return None
        heads, width = says.get("num_heads", 0), weights[1] // 3
        if mask in self._graph.constants or heads < 1 or weights[1] % 3 or width % heads or not weights[0]:
            return None
        if not self._fits(width // heads):
            return None
        scale = float(says.get("scale", 0)) or 1 / math.sqrt(width // heads)
        return Attention(
            source, node.output[0], self._graph.array(constants[0]), self._graph.array(constants[1]), heads, scale,
            mask, float(says.get("mask_filter_value", _HIDDEN)),
        )  # fmt: skip

    def _fits(self, width: int) -> bool:
        return width > 0 and width % self._lanes == 0


class _Run:
    """The `steps` that follow from one value, and what they have `made`: the width of each value, once it is known."""

    def __init__(self, graph: Graph, start: str) -> None:
        self._graph = graph
        self.steps: list[AnyStep] = []
        self.made: dict[str, int] = {start: -1}
        self._behind = {start}

    def depends(self, name: str) -> bool:
        """Tell whether the value `name` is computed from what the run began with."""
        return name in self._behind

    def add(self, step: AnyStep) -> None:
        """Take `step` on."""
        self.made[step.target] = len(self.steps)
        self._behind.add(step.target)
        self.steps.append(step)

    def leave(self, node: "NodeProto") -> None:
        """Leave `node` to others."""
        if any(name in self._behind for name in node.input):
            self._behind.update(filter(None, node.output))  # "" is one that is left out

    def fuse(self, node: "NodeProto") -> bool:
        """Let the step that computed what `node` reads do that too; tell whether it can."""
        at = max((self.made.get(name, -1) for name in node.input), default=-1)
        if at < 0 or len(node.output) != 1 or not node.output[0] or not self._graph.is_used_once(self.steps[at].target):
            return False
        step = self.steps[at]
        if isinstance(step, Linear):
            fused: AnyStep | None = self._linear(step, node)
        else:
            fused = self._attention(step, node) if isinstance(step, Attention) else None
        if fused is None:
            return False
        del self.made[step.target]
        self.steps[at] = replace(fused, target=node.output[0])
        self.made[node.output[0]] = at
        self._behind.add(node.output[0])
        return True

    def _linear(self, step: Linear, node: "NodeProto") -> Linear | None:
        """Return what `step` is with `node` too."""
        if step.addend:
            return None
        if node.op_type == "Add" and len(node.input) == 2:
            (other,) = (name for name in node.input if name != step.target)  # it is used once
            if self._graph.dims(other) == [step.width]:
                bias = self._graph.array(other)
                return replace(step, bias=bias) if step.bias is None and not step.activation else None
            return replace(step, addend=other) if other in self.made else None
        if step.activation or len(node.input) != 1:
            return None
        if node.op_type == "Relu":
            return replace(step, activation="relu")
        if node.op_type == "Gelu" and attributes(node).get("approximate", b"none") == b"none":
            return replace(step, activation="gelu")
        return None

    def _attention(self, step: Attention, node: "NodeProto") -> Attention | None:
        """Return what `step` is with `node` too."""
        if step.factor or node.op_type != "Mul" or len(node.input) != 2:
            return None
        (other,) = (name for name in node.input if name != step.target)
        return None if self.depends(other) or other in self._graph.constants else replace(step, factor=other)
