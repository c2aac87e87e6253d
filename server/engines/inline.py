"""Measures which batches of a model the event loop may wait for."""

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from layercast.models.manifest import Manifest, Program, TensorSpec
from layercast.models.onnx_shapes import steady
from layercast.server.engines.base import Engine, Inputs
from layercast.server.engines.choice import ChosenEngine
from layercast.server.engines.timing import Batch
from layercast.server.inline import NOWHERE, Inline, limit

logger = logging.getLogger(__name__)

_LENGTHS: Final = (16, 32, 48, 64, 96, 128, 192, 256)
"""Texts up to each of them are taken to be as long; closer together than engines are chosen for, since it is what
they take that decides."""
_RUNS: Final = 9
_LEAST_RUNS: Final = 3
_ENOUGH: Final = 0.01
"""Seconds for the runs of one size, after which only the least runs are made."""
# The code of a module or of TorchScript may do, and wait for, anything; what these do can be seen.
_SEEN: Final[Mapping[str, Program]] = {"onnx": "onnx", "onnx-int8": "onnx-int8", "winograd": "onnx", "encoder": "onnx"}
"""Engines by name, and the program that each reads."""
_MOST_BYTES: Final = 32 << 20
"""Larger programs are not looked into: Python's lock is kept meanwhile, and what is that large takes longer."""


def seen(engine: Engine) -> bool:
    """Tell whether batches may run on the event loop with `engine`, if they are short."""
    return engine.name in _SEEN and engine.device == "cpu"


def may_run_inline(engine: Engine, directory: Path, manifest: Manifest) -> bool:
    """Tell whether `engine` would run any batch on the event loop, were it quick enough. OSError for a program gone."""
    return seen(engine) and bool(lengths_of(manifest.inputs)) and _steady(directory, manifest, _SEEN[engine.name])


def lengths_of(inputs: Sequence[TensorSpec]) -> tuple[int, ...]:
    """Return the lengths to measure: (0,) where no size but the rows is a caller's to choose.

    None at all, (), for a model whose time depends on more than the rows and one length: on texts, or on a size that is
    no number of tokens.
    """
    if any(spec.datatype == "BYTES" for spec in inputs):
        return ()
    sizes = {(spec.pad is not None, place) for spec in inputs for place in spec.dynamic_dimensions()}
    if not sizes:
        return (0,)
    if sizes != {(True, 1)} or any(spec.pad is not None and spec.shape[1] != -1 for spec in inputs):
        return ()
    longest = min((spec.max_length for spec in inputs if spec.max_length), default=_LENGTHS[-1])
    return tuple(sorted({min(length, longest) for length in _LENGTHS}))


def inline_of(
    engine: Engine, directory: Path, manifest: Manifest, batch: Batch, rows: Sequence[int], lengths: Sequence[int]
) -> Inline:
    """Return how many of `rows`, which ascend, `engine` runs in so short a time that the event loop may wait for it.

    Measured at each of the `lengths` of `lengths_of`, up to the first at which it runs none. Nowhere for a program
    whose time depends on its inputs' values. OSError for one that is gone.
    """
    found: list[tuple[tuple[int, int], ...]] = []
    names: set[str] = set()
    for length in lengths:
        own: list[tuple[int, int]] = []
        for count in rows:
            try:
                inputs = batch(count, length)
                runs = engine.pick(inputs) if isinstance(engine, ChosenEngine) else engine
                if not seen(runs):
                    break
                seconds = _seconds(runs, inputs)
            except Exception as error:  # of a program that takes only some sizes, say
                kind = type(error).__name__
                logger.warning("%s fails at %d rows, %d long: %s: %s", manifest.name, count, length, kind, error)
                break
            if seconds > limit(count):
                break
            names.add(runs.name)
            least = next(requests for requests in range(count + 1) if seconds <= limit(requests))
            if own and own[-1][1] == least == 0:
                own.pop()
            own.append((count, least))
        if not own:
            break
        found.append(tuple(own))
    if not found or not all(_steady(directory, manifest, program) for program in {_SEEN[name] for name in names}):
        return NOWHERE
    return Inline(tuple(found), tuple(lengths[: len(found)]) if any(lengths) else ())


def _steady(directory: Path, manifest: Manifest, name: Program) -> bool:
    program = manifest.programs[name]
    if manifest.files[program].bytes > _MOST_BYTES:
        return False
    return steady((directory / program).read_bytes())  # verified when the engine was loaded


def _seconds(engine: Engine, inputs: Inputs) -> float:
    """Return the shortest duration of a warm run: what else the machine does meanwhile is not the model's."""
    engine.run(inputs)
    found: list[float] = []
    while len(found) < _RUNS and (len(found) < _LEAST_RUNS or sum(found) < _ENOUGH):
        start = time.perf_counter()
        engine.run(inputs)
        found.append(time.perf_counter() - start)
    return min(found)
