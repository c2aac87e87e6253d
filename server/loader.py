"""Loading one version: verify, load, check eval mode, reproduce the golden outputs, choose the engines, warm up."""

import logging
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import torch

from layercast.models.artefact import NO_TRUST, golden, refusal
from layercast.models.foreign.trust import Trust
from layercast.models.manifest import Manifest
from layercast.server import memory, tapping
from layercast.server.engines.base import Engine, EngineError, Inputs
from layercast.server.engines.selection import Engines, golden_rows, select
from layercast.server.engines.source import Source
from layercast.server.inline import inline_rows
from layercast.server.model import Loaded
from layercast.server.restrict import restricted, without_silent
from layercast.server.runner import Runner
from layercast.server.settings import ModelSettings

logger = logging.getLogger(__name__)

_TIMED_RUNS: Final = 7


class LoadError(Exception):
    """A version can't be served; the text says why, without paths, since clients read it in the repository index."""


def load(
    directory: Path, settings: ModelSettings, threads: int, trust: Trust = NO_TRUST, choices: Path | None = None
) -> Loaded:
    """Load the artefact in `directory`, ready to answer. Blocks for seconds: call it in a thread.

    A module whose code is not layercast's own and not in `trust` is not built: its exported programs answer, and its
    layers without a value in the ONNX program are marked unavailable with the reason. `threads` are what this process
    may use; the model's instances share them evenly, at least one each. Which engine runs which batch is measured, once
    if the folder `choices` keeps it. Raises LoadError for a file that differs from the manifest, code that does not
    give a module, one in training mode, outputs that differ from the golden ones, or an engine or device that is not to
    be had.
    """
    start = time.perf_counter()
    own = max(1, threads // settings.instances)
    if settings.instances > threads:
        logger.warning("%s: %d instances on %d processors", directory.parent.name, settings.instances, threads)
    # Torch counts threads per thread, and gives a new one what was set last anywhere.
    torch.set_num_threads(own)
    with _told(directory):
        manifest = Manifest.read(directory)
        device = choose_device(settings.device)
        source = Source(directory, manifest, device, own, trust, refusal(manifest, trust))
        recorded = golden(directory, manifest)
        choice, first = select(source, settings, recorded, choices)
        manifest.verify_files(directory)  # what was loaded was verified as it was read
        others = [Engines.load(source, choice.used, recorded) for _ in range(1, settings.instances)]
        program = tapping.program(directory, manifest, device, own, settings.engine)
    every = (first, *others)
    readers = [tapping.chosen(engines.eager, program, recorded) for engines in every]
    note = ""
    if source.untrusted:
        manifest, note = tapping.without_module(manifest, readers[0], source.untrusted)
        logger.warning("%s: %s", manifest.name, note)
    if first.eager:
        manifest = without_silent(manifest, first.eager, recorded.inputs)
    manifest = restricted(manifest, settings)
    largest = golden_rows(recorded, settings.max_batch)
    for engines in every:
        for engine in engines.fast.values():
            engine.run(largest)
    runners = tuple(
        Runner(manifest, engines.chosen(choice, manifest), engines.eager, taps)
        for engines, taps in zip(every, readers, strict=True)
    )
    one_row = golden_rows(recorded, 1)
    warmup_ms = _time(runners[0].fast, one_row)
    inline = inline_rows(runners[0].fast, manifest, one_row, settings.max_batch)
    memory.trim()  # of what was read, and of engines that run nothing
    return Loaded(manifest, settings, runners, own, time.perf_counter() - start, warmup_ms, note, str(choice), inline)


@contextmanager
def _told(directory: Path) -> Iterator[None]:
    """Turn what reading an artefact raises into a LoadError."""
    try:
        yield
    except (ValueError, OSError, RuntimeError, EngineError) as error:
        raise LoadError(_without_paths(str(error), directory)) from error


def choose_device(name: str) -> torch.device:
    """Return the device for the setting `auto`, `cpu` or `cuda`; EngineError when CUDA is wanted and absent."""
    if name == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    if name == "cuda":
        raise EngineError("device is set to cuda, but torch finds no CUDA device here; set it to auto or cpu")
    return torch.device("cpu")


def _time(engine: Engine, inputs: Inputs) -> float:
    """Return the median duration of a warm run, in milliseconds."""
    engine.run(inputs)
    durations = []
    for _ in range(_TIMED_RUNS):
        start = time.perf_counter()
        engine.run(inputs)
        durations.append(time.perf_counter() - start)
    return statistics.median(durations) * 1000


def _without_paths(text: str, directory: Path) -> str:
    return text.replace(f"{directory}/", "").replace(str(directory), directory.name).splitlines()[0]
