"""Golden values: what the exporting machine computed, which every engine in use must give again."""

from typing import Final

import numpy as np

from layercast.models.artefact import Golden
from layercast.models.manifest import Manifest
from layercast.server.engines.base import Engine, EngineError

_TOLERANCE: Final = 1e-3


def check_golden(engine: Engine, recorded: Golden, manifest: Manifest) -> None:
    """Raise EngineError unless the engine reproduces the recorded outputs; int8, as nearly as the export found."""
    tolerance = manifest.int8.tolerance if manifest.int8 and engine.name == "onnx-int8" else _TOLERANCE
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
        if not np.allclose(values, wanted, rtol=_TOLERANCE, atol=tolerance):
            worst = float(np.max(np.abs(values.astype("f8") - wanted.astype("f8"))))
            how = "is not a number where" if np.isnan(worst) else f"differs by up to {worst:.3g} from what"
            raise EngineError(f"{where} {how} the export recorded; export the model again")
