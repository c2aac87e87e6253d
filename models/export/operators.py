"""Finds operators in programs that a server would not know, and the modules that call them."""

import re
from collections.abc import Iterator
from typing import Any, Final

from torch import fx
from torch._ops import OpOverload
from torch.export import ExportedProgram

from layercast.models.export.checks import ExportError, describe
from layercast.models.export.positional import Positional

_OURS: Final = frozenset({"aten", "prim", "prims", "profiler", "quantized"})
"""Namespaces of torch itself. What others register lives in the process that registered it."""

_UNTRANSLATED: Final = re.compile(r"Error when translating node .*?target=torch\.ops\.(?P<operator>\w+\.\w+)")
INSIDE: Final = "module."
"""Where `Positional` keeps the module that is exported."""


def check_captured(program: ExportedProgram, name: str) -> None:
    """Refuse a captured program that calls a custom operator; ExportError names it and the module that calls it."""
    for node in _calls(program):
        if isinstance(node.target, OpOverload) and node.target.namespace not in _OURS:
            raise _custom(name, node.target._schema.name, _caller(node))


def check_traced(program: Any, module: Positional, name: str) -> None:
    """Refuse a traced program that calls a custom operator, likewise."""
    for node in _traced(program.inlined_graph):
        kind = str(node.kind())
        if kind.partition("::")[0] not in _OURS:
            path = str(node.scopeName()).rpartition("/")[2].removeprefix("__module.")
            inside = path.removeprefix(INSIDE) if path.startswith(INSIDE) else ""
            raise _custom(name, kind, describe(module.module, inside))


def untranslated(program: ExportedProgram, error: BaseException) -> str:
    """Return which operator, called by which module, the ONNX exporter's `error` is about; "" when it does not say."""
    found = None
    cause: BaseException | None = error
    while cause is not None and not found:
        found, cause = _UNTRANSLATED.search(str(cause)), cause.__cause__
    if not found:
        return ""
    operator = found["operator"]
    # The exporter may have put a simpler operator of much the same name in the place of the one that was called.
    calls = [
        node for node in _calls(program)
        if isinstance(node.target, OpOverload) and node.target._schema.name.endswith(operator.rpartition(".")[2])
    ]  # fmt: skip
    return f"{operator}, which {_caller(calls[0]) if calls else 'the model'} calls"


def _caller(node: fx.Node) -> str:
    """Return how messages name the innermost module that called `node`, as `checks.describe` does."""
    stack = node.meta.get("nn_module_stack") or {}
    path, kind = next(reversed(stack.values())) if stack else ("", "the model")
    short = (kind if isinstance(kind, str) else kind.__name__).rpartition(".")[2]
    return f"module {path.removeprefix(INSIDE)!r} ({short})" if path.startswith(INSIDE) else f"{short} itself"


def _custom(name: str, operator: str, where: str) -> ExportError:
    return ExportError(
        f"{name}: {where} calls the custom operator {operator}, which a server does not have; write it with torch's own"
    )


def _calls(program: ExportedProgram) -> Iterator[fx.Node]:
    for part in program.graph_module.modules():
        if isinstance(part, fx.GraphModule):
            yield from (node for node in part.graph.nodes if node.op == "call_function")


def _traced(block: Any) -> Iterator[Any]:
    for node in block.nodes():
        yield node
        for inner in node.blocks():
            yield from _traced(inner)
