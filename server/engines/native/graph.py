"""Reads the graph of an ONNX program for what a kernel can compute of it."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

import numpy as np

from layercast.models.onnx_cut import CutError, parsed, read
from layercast.server.engines.native.memory import Floats

if TYPE_CHECKING:
    from onnx import NodeProto


class Step(Protocol):
    """One call of a kernel, for a few nodes of the program; values are named as there."""

    @property
    def target(self) -> str:
        """The value that it computes."""

    @property
    def reads(self) -> tuple[str, ...]:
        """The values inside the body that it reads, one as often as it reads it."""


_Step = TypeVar("_Step", bound=Step)

_MOST_STARTS: Final = 64
"""Runs that are looked at: of each, all that follows is."""
_OPSET: Final = 7
"""Of ONNX's own operators; until then they say in attributes how shapes are matched."""


class Graph:
    """The nodes of a program in order, its `outputs`, and its float32 weights by name."""

    def __init__(self, content: bytes) -> None:
        """CutError for no program, one whose values share a name, and operators that may mean something else."""
        from onnx import TensorProto, numpy_helper

        model = parsed(content)
        graph = model.graph
        if model.functions or any(not each.domain and each.version < _OPSET for each in model.opset_import):
            raise CutError(f"it has functions, or operators of before opset {_OPSET}")
        self.nodes = graph.node
        self.outputs = [output.name for output in graph.output]
        self.given = {value.name for value in graph.input}
        made = [name for node in graph.node for name in node.output if name]
        every = [*self.given, *made, *(weight.name for weight in graph.initializer)]
        if len(set(every)) != len(every):
            raise CutError("values share a name")
        self._uses = Counter(name for node in graph.node for name in read(node))
        self._uses.update(self.outputs)
        self.constants = {weight.name for weight in graph.initializer}
        self.constants.update(name for node in graph.node if node.op_type == "Constant" for name in node.output)
        self.weights = {w.name: w for w in graph.initializer if w.data_type == TensorProto.FLOAT}
        self._to_array = numpy_helper.to_array

    def dims(self, name: str) -> list[int] | None:
        """Return the shape of the weights `name`, None where there are none of float32."""
        return list(self.weights[name].dims) if name in self.weights else None

    def array(self, name: str) -> Floats:
        """Return the weights `name`."""
        return np.asarray(self._to_array(self.weights[name]), np.float32)

    def is_used_once(self, name: str) -> bool:
        """Tell whether one node, and nothing else, reads the value `name`, and does so once."""
        return self._uses[name] == 1

    def runs(
        self, starts: Iterable[str], run_from: Callable[[str], Sequence[_Step]]
    ) -> Iterator[tuple[str, tuple[_Step, ...]]]:
        """Yield, of what follows from each of the `starts`, the usable beginning; not of a start that lies in one."""
        inside: set[str] = set()
        looked_at = 0
        for start in starts:
            if start in inside or looked_at == _MOST_STARTS:
                continue
            looked_at += 1
            steps = self.usable(run_from(start))
            inside.update(step.target for step in steps[:-1])
            if steps:
                yield start, steps

    def usable(self, steps: Sequence[_Step]) -> tuple[_Step, ...]:
        """Return the longest beginning of `steps` of which the rest of the program uses only the last's target."""
        open_uses: dict[str, int] = {}
        length = 0
        for at, step in enumerate(steps):
            for name in step.reads:
                if name in open_uses:
                    open_uses[name] -= 1
                    if not open_uses[name]:
                        del open_uses[name]
            if self._uses[step.target]:
                open_uses[step.target] = self._uses[step.target]
            # The rest of a program can't give what it is given.
            passed_on = step.target in self.outputs and len(self.outputs) > 1
            if len(open_uses) == 1 and step.target in open_uses and not passed_on:
                length = at + 1
        return tuple(steps[:length])


def attributes(node: "NodeProto") -> dict[str, Any]:
    """Return the attributes of `node` by name."""
    from onnx import helper

    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
