"""ONNX programs, one file each, by torch's graph-based exporter. Needs the `export` extra to write."""

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from torch.export import ExportedProgram

from layercast.models.export.checks import ExportError
from layercast.models.export.exported import dynamic_shapes
from layercast.models.manifest import TensorSpec

OPSET: Final = 20
"""Version of the ONNX operators that programs use; ONNX Runtime has run it since 1.17."""

_LOGGER: Final = "torch.onnx._internal.exporter._registration"


def write(
    program: ExportedProgram, inputs: Mapping[str, Tensor], specs: Sequence[TensorSpec], outputs: Sequence[str],
    path: Path, name: str,
) -> None:  # fmt: skip
    """Translate the captured `program` into `path`, with the names of inputs and outputs."""
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
        raise ExportError(
            f"{name}: ONNX export failed: {type(error).__name__}: {str(error).splitlines()[0]}"
        ) from error
    if translated is None:
        raise ExportError(f"{name}: torch.onnx.export returned nothing. This is a bug.")
    model = translated.model_proto
    _strip(model.graph)
    path.write_bytes(model.SerializeToString())


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
