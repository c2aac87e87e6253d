"""Golden values: what the exporting machine computed, which every engine in use must give again."""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from layercast.models.artefact import Golden
from layercast.models.manifest import Manifest
from layercast.server.engines.base import Engine, EngineError
from layercast.server.settings import Precision

_TOLERANCE: Final = 1e-3
_BF16: Final = 2.0**-5
"""Of an output's largest value: eight roundings of BF16, whose numbers have 8 bits, in the same direction."""


_NATIVE: Final = 1e-4
"""Of an output's largest value, or of 1: stricter, since how exact it is depends on the weights."""


class Tolerance:
    """By how much outputs may differ from those that were recorded, or computed in another way."""

    def __init__(self, precision: Precision, least: float = _TOLERANCE) -> None:
        self._relative = _BF16 if precision == "bf16" else 0.0
        self._least = least

    def close(self, values: NDArray[Any], wanted: NDArray[Any], nan: bool = False) -> bool:
        """Tell whether the output `values` is what was `wanted`; with `nan`, two that are not numbers are equal."""
        finite = np.abs(wanted[np.isfinite(wanted)]) if self._relative else wanted[:0]
        atol = self._least + self._relative * float(np.max(finite, initial=0.0))
        return np.allclose(values, wanted, rtol=_TOLERANCE, atol=atol, equal_nan=nan)

    def agree(self, got: Mapping[str, NDArray[Any]], wanted: Mapping[str, NDArray[Any]]) -> bool:
        """Tell whether two runs of one batch gave the same outputs."""
        return all(self.close(got[name], array, nan=True) for name, array in wanted.items())


class OfLargest:
    """Lets outputs differ by a `part` of the largest value, or of 1 where all are smaller."""

    def __init__(self, part: float) -> None:
        self._part = part

    def close(self, values: NDArray[Any], wanted: NDArray[Any]) -> bool:
        """Tell whether the output `values` is what was `wanted`."""
        largest = float(np.max(np.abs(wanted[np.isfinite(wanted)]), initial=1.0))
        return np.allclose(values, wanted, rtol=0.0, atol=self._part * largest)


def check_golden(engine: Engine, recorded: Golden, manifest: Manifest, precision: Precision = "fp32") -> None:
    """Raise EngineError unless the engine reproduces the recorded outputs.

    To 1e-3; int8 as nearly as the export found; kernels of our own to 1e-4 of an output's largest value, BF16 to
    3 %.
    """
    int8 = manifest.int8 if engine.name == "onnx-int8" else None
    tolerance: Tolerance | OfLargest = Tolerance(precision, int8.tolerance if int8 else _TOLERANCE)
    remedy = "export the model again"
    if engine.name in ("winograd", "encoder"):
        tolerance, remedy = OfLargest(_NATIVE), "its weights need another engine"
    try:
        got = engine.run(recorded.inputs)
    except Exception as error:
        lines = str(error).splitlines()
        raise EngineError(
            f"engine {engine.name} failed on the golden inputs: {type(error).__name__}: {lines[0] if lines else ''}"
        ) from error
    for name, wanted in recorded.outputs.items():
        where = f"engine {engine.name}, output {name!r}"
        if name not in got:
            raise EngineError(f"{where}: the engine does not give it; it gives {', '.join(got) or 'nothing'}")
        values = got[name]
        for what, want, came in (
            ("shape", list(wanted.shape), list(values.shape)),
            ("dtype", str(wanted.dtype), str(values.dtype)),
        ):
            if want != came:
                raise EngineError(f"{where}: want {what} {want} as recorded at the export, got {came}")
        if not tolerance.close(values, wanted):
            worst = float(np.max(np.abs(values.astype("f8") - wanted.astype("f8"))))
            how = "is not a number where" if np.isnan(worst) else f"differs by up to {worst:.3g} from what"
            raise EngineError(f"{where} {how} the export recorded; {remedy}")
