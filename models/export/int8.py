"""The int8 program: `model.onnx` quantised by ONNX Runtime, with what that costs measured on rows held out.

Graphs with layer norms (transformers) are quantised dynamically, others statically: measured on the zoo, a static
transformer is three times as far from the float one, and a dynamic convolution is six times as slow as the float one.
Weights keep 7 of their 8 bits: on CPUs without VNNI instructions the sums of full ones overflow, and a program should
answer alike wherever it is served.
"""

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch

from layercast.models.card import Card
from layercast.models.examples import Examples
from layercast.models.export.calibration import Calibration
from layercast.models.export.checks import ExportError
from layercast.models.export.parity import BATCHES, Runner, onnx_runner
from layercast.models.manifest import Int8

_BATCH: Final = 32
_SLACK: Final = 2.0
"""How many times its difference on the golden rows the program may differ there on another CPU."""

_ROUNDING: Final = 1e-3

Array = np.ndarray[Any, Any]
Rows = Mapping[str, Array]
Method = Literal["static", "dynamic"]


def write(source: Path, path: Path, card: Card, calibration: Calibration, golden: Examples, golden_rows: int) -> Int8:
    """Quantise the ONNX program `source` into `path` and return what it costs.

    `golden` makes the artefact's golden inputs. ExportError when the model is not of float32, cannot be quantised, or
    no longer takes every batch size.
    """
    content = source.read_bytes()
    others = [spec.name for spec in card.outputs if spec.datatype != "FP32"]
    if others:
        raise ExportError(f"{card.name}: int8 wants outputs of FP32, got others in {', '.join(others)}")
    try:
        method = _quantise(content, path, calibration)
    except ImportError as error:
        raise ExportError(f"int8 needs {error.name}: pip install 'layercast[export]'") from error
    except Exception as error:
        raise ExportError(f"{card.name}: ONNX Runtime cannot quantise the model: {error}") from error
    outputs = [spec.name for spec in card.outputs]
    plain, int8 = onnx_runner(content, outputs), onnx_runner(path.read_bytes(), outputs)
    _check_sizes(plain, int8, card)
    return _measure(plain, int8, method, calibration, golden.make(golden_rows))


def _quantise(content: bytes, path: Path, calibration: Calibration) -> Method:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    model = onnx.load_from_string(content)
    # The exporter's notes on shapes do not survive the quantiser's rewriting of weights; it finds them again.
    del model.graph.value_info[:]
    dynamic = any(node.op_type == "LayerNormalization" for node in model.graph.node)
    with tempfile.TemporaryDirectory() as folder:
        bare, prepared = Path(folder) / "bare.onnx", Path(folder) / "prepared.onnx"
        bare.write_bytes(model.SerializeToString())
        quant_pre_process(bare, prepared, skip_symbolic_shape=True)
        if dynamic:
            quantize_dynamic(
                prepared, path, weight_type=QuantType.QInt8, reduce_range=True,
                extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
            )  # fmt: skip
            return "dynamic"
        quantize_static(
            prepared, path, _Reader(calibration.rows), per_channel=True, reduce_range=True,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
        )  # fmt: skip
    return "static"


class _Reader:
    """Hands the calibration rows to the quantiser, a batch at a time."""

    def __init__(self, rows: Rows) -> None:
        self._batches = _batches(rows)

    def get_next(self) -> dict[str, Array] | None:
        return next(self._batches, None)


def _batches(rows: Rows) -> Iterator[dict[str, Array]]:
    for at in range(0, len(next(iter(rows.values()))), _BATCH):
        yield {name: array[at : at + _BATCH] for name, array in rows.items()}


def _run(run: Runner, rows: Rows) -> list[Array]:
    """Return every output for all rows, in float64."""
    parts = [run({name: torch.from_numpy(array) for name, array in batch.items()}) for batch in _batches(rows)]
    return [np.concatenate(output).astype(np.float64) for output in zip(*parts, strict=True)]


def _check_sizes(plain: Runner, int8: Runner, card: Card) -> None:
    examples = Examples.of(card)
    for batch in BATCHES:
        for length in examples.lengths():
            inputs = examples.make(batch, length)
            wanted = [array.shape for array in plain(inputs)]
            try:
                got = [array.shape for array in int8(inputs)]
            except Exception as error:
                raise ExportError(f"{card.name}: the onnx-int8 program fails at batch {batch}: {error}") from error
            if got != wanted:
                raise ExportError(f"{card.name}: the onnx-int8 program gives {got} at batch {batch}, want {wanted}")


def _measure(
    plain: Runner, int8: Runner, method: Method, calibration: Calibration, golden: Mapping[str, torch.Tensor]
) -> Int8:
    try:
        wanted, got = _run(plain, calibration.held_out), _run(int8, calibration.held_out)
    except Exception as error:
        raise ExportError(f"the rows of {calibration.data} cannot be computed: {error}") from error
    apart = np.concatenate([np.abs(one - other).ravel() for one, other in zip(wanted, got, strict=True)])
    if not np.isfinite(apart).all():
        raise ExportError("the onnx-int8 program or the float one gives values that are not finite on the rows given")
    scores = wanted[0].ndim == 2 and wanted[0].shape[1] > 1
    classes: dict[Literal["onnx", "onnx-int8"], Array] = {}
    if scores:
        classes = {"onnx": wanted[0].argmax(-1), "onnx-int8": got[0].argmax(-1)}
    targets = calibration.targets
    on_golden = max(float(np.abs(one - other).max()) for one, other in zip(plain(golden), int8(golden), strict=True))
    return Int8(
        method=method,
        data=calibration.data,
        calibration_rows=len(next(iter(calibration.rows.values()))) if method == "static" else 0,
        measured_rows=len(wanted[0]),
        largest_difference=float(apart.max()),
        mean_difference=float(apart.mean()),
        agreement=float((classes["onnx"] == classes["onnx-int8"]).mean()) if scores else None,
        accuracy={} if targets is None else {
            program: float((found == targets).mean()) for program, found in classes.items()
        },
        tolerance=_SLACK * on_golden + _ROUNDING,
    )  # fmt: skip
