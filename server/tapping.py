"""What reads the layers of a version that is loaded: its module, parts of its ONNX program, or whichever is faster."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch

from layercast.models.artefact import Golden
from layercast.models.manifest import Manifest
from layercast.server.engines.base import Tapping
from layercast.server.engines.eager import EagerEngine
from layercast.server.engines.tapped import TappedEngine
from layercast.server.engines.taps import OnnxProgram
from layercast.server.restrict import unavailable
from layercast.server.settings import EngineName
from layercast.server.work import Tap

logger = logging.getLogger(__name__)

_MOST_BYTES: Final = 128 << 20
"""Programs larger than this are not cut while others are answered: Python's lock is kept for 0.1 s every 100 MB."""


def program(
    directory: Path, manifest: Manifest, device: torch.device, threads: int, asked: EngineName
) -> OnnxProgram | None:
    """Return the program to read layers from; None where no available layer has a value in it, or hooks read them all.

    They are on a GPU, where reducers run before values leave it, and where the engine was `asked` for as `eager`.
    """
    if not manifest.onnx_values or "onnx" not in manifest.programs or asked == "eager" or device.type != "cpu":
        return None
    return OnnxProgram(directory, manifest, threads)


def readers(
    eagers: Sequence[EagerEngine | None], programs: Sequence[OnnxProgram | None], recorded: Golden
) -> list[Tapping | None]:
    """Return what reads the available layers of each instance by its eager engine and program; None if neither can.

    All have an eager engine, or none has; then they share one session. They differ in the threads of their programs.
    """
    first = programs[0]
    if first is None:
        return list(eagers)
    plain: list[Tapping | None] = list(eagers) if all(eagers) else [_whole(first, recorded)] * len(eagers)
    if first.bytes > _MOST_BYTES:
        return plain
    pairs = zip(plain, programs, strict=True)
    return [TappedEngine(each, program, len(plain)) if each and program else None for each, program in pairs]


def without_module(manifest: Manifest, taps: Tapping | None, reason: str) -> tuple[Manifest, str]:
    """Return `manifest` with the layers that `taps` can't read marked unavailable for `reason`, and a note of it."""
    values = manifest.onnx_values if taps else {}
    before = sum(layer.available for layer in manifest.layers)
    program = f"layers are read from the ONNX program, {len(values)} of {before}"
    which = program if values else "layers are not available"
    return unavailable(manifest, lambda layer: "" if layer.path in values else reason), f"{which}: {reason}"


def _whole(program: OnnxProgram, recorded: Golden) -> Tapping | None:
    """Return what reads every layer that has a value in `program`, tried on the golden inputs; None if it fails."""
    try:
        whole = program.part(program.layers, predict=True)
        whole.tapped(recorded.inputs, [Tap(path) for path in program.layers], predict=True)
    except Exception as error:  # whatever anyone's manifest and program bring about
        text = next(iter(str(error).splitlines()), type(error).__name__)
        logger.warning("%s: no layer can be read from the ONNX program: %s", program.manifest.name, text)
        return None
    return whole
