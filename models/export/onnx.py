"""ONNX programs, one file each, by torch's graph-based exporter. Needs the `export` extra to write."""

import ast
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from torch.export import ExportedProgram

from layercast.models.examples import KINDS, Examples
from layercast.models.export.checks import ExportError
from layercast.models.export.exported import EXAMPLE_BATCH, dynamic_shapes
from layercast.models.export.operators import INSIDE, untranslated
from layercast.models.export.parity import difference_of, onnx_runner
from layercast.models.manifest import TensorSpec

logger = logging.getLogger(__name__)

OPSET: Final = 20
"""Version of the ONNX operators that programs use; ONNX Runtime has run it since 1.17."""

_FUSED_LIMIT: Final = 1e-5
_SCOPES: Final = "pkg.torch.onnx.name_scopes"
_LOGGER: Final = "torch.onnx._internal.exporter._registration"


def write(
    program: ExportedProgram, inputs: Mapping[str, Tensor], specs: Sequence[TensorSpec], outputs: Sequence[str],
    path: Path, name: str,
) -> dict[str, list[str]]:  # fmt: skip
    """Translate the captured `program` into `path`, with the names of inputs and outputs.

    Returns the paths of the modules that each value was computed in, outermost first, by the value's name.
    """
    try:
        with _quiet():
            translated = torch.onnx.export(
                program,
                tuple(inputs.values()),
                dynamo=True,
                opset_version=OPSET,
                input_names=list(inputs),
                output_names=list(outputs),
                dynamic_shapes=(dynamic_shapes(specs),),
                external_data=False,
                verbose=False,
            )
    except ImportError as error:
        raise ExportError(f"ONNX export needs {error.name}: pip install 'layercast[export]'") from error
    except Exception as error:
        missing = untranslated(program, error)
        if missing:
            raise ExportError(f"{name}: ONNX opset {OPSET} has nothing for the operator {missing}") from error
        raise ExportError(
            f"{name}: ONNX export failed: {type(error).__name__}: {str(error).splitlines()[0]}"
        ) from error
    if translated is None:
        raise ExportError(f"{name}: torch.onnx.export returned nothing. This is a bug.")
    scopes = _scopes(translated.model)
    plain = _serialise(translated.model)
    path.write_bytes(_fused_alike(plain, specs, outputs) or plain)
    return scopes


def _scopes(model: Any) -> dict[str, list[str]]:
    """Read where values were computed from the exporter's notes, which are not kept."""
    found: dict[str, list[str]] = {}
    for node in model.graph:
        try:
            scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
        except (ValueError, SyntaxError):
            continue
        paths = [scope.removeprefix(INSIDE) for scope in scopes if scope.startswith(INSIDE)]
        found |= {output.name: paths for output in node.outputs}
    return found


def opsets(content: bytes) -> dict[str, int]:
    """Return the version of every set of operators that the ONNX model in `content` uses, by domain."""
    import onnx

    return {part.domain or "ai.onnx": part.version for part in onnx.load_from_string(content).opset_import}


def _serialise(model: Any) -> bytes:
    import onnx_ir

    proto = onnx_ir.to_proto(model)
    _strip(proto.graph)
    content: bytes = proto.SerializeToString()
    return content


def _fused_alike(plain: bytes, specs: Sequence[TensorSpec], outputs: Sequence[str]) -> bytes | None:
    """Return the model with its attention fused; None where there is none, it gives something else or can't be run."""
    try:
        fused = _fused(plain)
        return fused if fused and _agree(plain, fused, specs, outputs) else None
    except Exception as error:  # of a rewriter or a runtime; where `plain` itself can't be run, parity says how
        logger.debug("attention is left as it is: %s: %s", type(error).__name__, error)
        return None


def _fused(content: bytes) -> bytes | None:
    """Return the model with its attention in ONNX Runtime's own operator; None where there is no such attention."""
    import onnx
    import onnx_ir

    from layercast.models.export.attention import fuse

    model, count = fuse(onnx_ir.from_proto(onnx.load_from_string(content)))
    return _serialise(model) if count else None


def _agree(plain: bytes, fused: bytes, specs: Sequence[TensorSpec], outputs: Sequence[str]) -> bool:
    """Tell whether both models give the same, also for rows of padding, in part or all, where they may differ."""
    examples = Examples(specs)
    one, other = onnx_runner(plain, outputs), onnx_runner(fused, outputs)
    for length in examples.lengths():
        made = {kind: examples.make(EXAMPLE_BATCH, length, kind) for kind in KINDS}
        tailed = [_tailed(made["random"], made[kind]) for kind in ("zeros", "low")]
        for inputs in (*made.values(), *tailed):
            if any(difference_of(a, b) > _FUSED_LIMIT for a, b in zip(other(inputs), one(inputs), strict=True)):
                return False
    return True


def _tailed(inputs: Mapping[str, Tensor], tails: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return `inputs` that end with those of `tails`, each row at another place: a mask may be made of any number."""
    found: dict[str, Tensor] = {}
    for name, values in inputs.items():
        found[name] = values.clone()
        for row in range(1, len(values)):
            if values.dim() > 1:
                begin = max(1, values.shape[1] * row // len(values))
                found[name][row, begin:] = tails[name][row, begin:]
    return found


def _strip(graph: Any) -> None:
    """Remove the exporter's notes, which hold stack traces with the paths of the exporting machine."""
    for part in (*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer, graph):
        del part.metadata_props[:]


@contextmanager
def _quiet() -> Iterator[None]:
    """Mute what the exporter says about itself: operators of torchvision, which is not here, and its own future."""
    logger = logging.getLogger(_LOGGER)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
