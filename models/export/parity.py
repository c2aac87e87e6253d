"""Parity: exported programs against the eager module, on several batch sizes, lengths and kinds of input."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from layercast.models.artefact import to_numpy
from layercast.models.examples import KINDS, Examples, Kind
from layercast.models.export.checks import ExportError
from layercast.models.export.positional import named_outputs
from layercast.models.onnx_runtime import onnxruntime

BATCHES: Final = (1, 2, 5, 32)
LIMIT: Final = 1e-4
"""Largest difference that is taken for rounding, in units of an output's largest value where that is over 1."""

Array = np.ndarray[Any, Any]
Runner = Callable[[Mapping[str, Tensor]], Sequence[Array]]
"""Runs a program on named inputs and returns its outputs in the order of the manifest."""


@dataclass(frozen=True)
class Case:
    """One input that a program is tried on, and what the eager module gives for it."""

    batch: int
    length: int
    kind: Kind
    inputs: Mapping[str, Tensor]
    expected: Mapping[str, Array]

    def __str__(self) -> str:
        length = f", length {self.length}" if self.length else ""
        return f"batch {self.batch}{length}, {self.kind} values"


def cases(module: nn.Module, examples: Examples, outputs: Sequence[str]) -> list[Case]:
    """Run the eager `module` on every case: all kinds on small batches, else random values."""
    first, *lengths = examples.lengths()
    wanted: list[tuple[int, int, Kind]] = [(batch, first, kind) for batch in BATCHES[:-1] for kind in KINDS]
    wanted.append((BATCHES[-1], first, "random"))
    wanted += [(batch, length, "random") for batch in BATCHES[:-1] for length in lengths]
    return [_case(module, examples, outputs, *chosen) for chosen in wanted]


def measure(program: str, run: Runner, tried: Sequence[Case], name: str) -> dict[int, float]:
    """Return the largest difference of `program` by batch size; ExportError, with the case, where it is over LIMIT."""
    largest: dict[int, float] = {}
    for case in tried:
        try:
            results = run(case.inputs)
        except Exception as error:
            cause = next(iter(str(error).splitlines()), "")
            raise ExportError(
                f"{name}: the {program} program fails at {case} where the module does not, so a size was taken as a "
                f"constant: {type(error).__name__}: {cause}"
            ) from error
        for (output, expected), result in zip(case.expected.items(), results, strict=True):
            if result.shape != expected.shape or result.dtype != expected.dtype:
                raise ExportError(
                    f"{name}: output {output!r} of the {program} program at {case}: want {expected.dtype} "
                    f"{list(expected.shape)}, got {result.dtype} {list(result.shape)}; a size was taken as a constant"
                )
            difference, limit = difference_of(result, expected), LIMIT * _scale(expected)
            if not difference <= limit:
                raise ExportError(
                    f"{name}: output {output!r} of the {program} program differs from the module by {difference:.2g} "
                    f"at {case} (limit {limit:.2g}); a branch or a value was taken as a constant"
                )
            largest[case.batch] = max(largest.get(case.batch, 0.0), difference)
    return largest


def difference_of(result: Array, expected: Array) -> float:
    """Return the largest absolute difference; equal infinities count as equal, as does NaN in both."""
    if not expected.size:
        return 0.0
    got, want = result.astype(np.float64), expected.astype(np.float64)
    same = (got == want) | (np.isnan(got) & np.isnan(want))
    with np.errstate(invalid="ignore"):
        apart = np.where(same, 0.0, np.abs(got - want))
    return float(np.where(np.isnan(apart), np.inf, apart).max())


def _scale(expected: Array) -> float:
    """Return the largest finite magnitude among `expected`, at least 1: float32 rounds in proportion to the values."""
    values = np.abs(expected.astype(np.float64))
    return float(np.max(values, where=np.isfinite(values), initial=1.0))


def torch_runner(program: nn.Module) -> Runner:
    """Return a runner of a program that takes and returns tensors in order."""

    def run(inputs: Mapping[str, Tensor]) -> list[Array]:
        with torch.inference_mode():
            result = program(*inputs.values())
        return [to_numpy(value) for value in ([result] if isinstance(result, Tensor) else result)]

    return run


def onnx_runner(content: bytes, outputs: Sequence[str]) -> Runner:
    """Return a runner of an ONNX model on the CPU."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])

    def run(inputs: Mapping[str, Tensor]) -> list[Array]:
        return list(session.run(list(outputs), {name: to_numpy(tensor) for name, tensor in inputs.items()}))

    return run


def _case(module: nn.Module, examples: Examples, outputs: Sequence[str], batch: int, length: int, kind: Kind) -> Case:
    inputs = examples.make(batch, length, kind)
    with torch.inference_mode():
        results = named_outputs(module(**inputs), outputs)
    return Case(batch, length, kind, inputs, {name: to_numpy(value) for name, value in results.items()})
