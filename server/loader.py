"""Loading one version: verify, load, check eval mode, reproduce the golden outputs, choose the engines, warm up."""

import logging
import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple

import torch

from layercast.models.artefact import NO_TRUST, Golden, golden, refusal
from layercast.models.foreign.trust import Trust
from layercast.models.manifest import Manifest
from layercast.server import memory, processors, tapping
from layercast.server.engines import cuda
from layercast.server.engines.base import Engine, EngineError, Tapping
from layercast.server.engines.choice import Choice
from layercast.server.engines.eager import EagerEngine
from layercast.server.engines.inline import inline_of, lengths_of
from layercast.server.engines.selection import Batches, Engines, golden_rows, select
from layercast.server.engines.source import Source
from layercast.server.engines.timing import durations
from layercast.server.errors import OutOfMemory
from layercast.server.inline import Inline
from layercast.server.model import Loaded
from layercast.server.processors import denormals_are_zero
from layercast.server.restrict import restricted, without_silent
from layercast.server.runner import Runner
from layercast.server.settings import ModelSettings

logger = logging.getLogger(__name__)

_TIMED_RUNS: Final = 7


class LoadError(Exception):
    """A version can't be served; the text says why, without paths, since clients read it in the repository index."""


@denormals_are_zero()
def load(
    directory: Path, settings: ModelSettings, threads: int, trust: Trust = NO_TRUST, choices: Path | None = None
) -> Loaded:
    """Load the artefact in `directory`, ready to answer. Blocks for seconds: call it in a thread.

    A module whose code is not layercast's own and not in `trust` is not built: its exported programs answer, and its
    layers without a value in the ONNX program are marked unavailable with the reason. `threads` are what this process
    may use; the model's instances share them evenly, at least one each. Which engine runs which batch, and in how many
    instances where the settings leave that open, is measured, once if the folder `choices` keeps it. Raises LoadError
    for a file that differs from the manifest, code that does not give a module, one in training mode, outputs that
    differ from the golden ones, or an engine or device that is not to be had.
    """
    start = time.perf_counter()
    asked = settings.instances or 1
    own = max(1, threads // asked)
    if settings.instances > threads:
        logger.warning("%s: %d instances on %d processors", directory.parent.name, settings.instances, threads)
    # Torch counts threads per thread, and gives a new one what was set last anywhere.
    torch.set_num_threads(own)
    with _told(directory):
        manifest = Manifest.read(directory)
        devices = choose_devices(settings.device, asked)
        source = Source(directory, manifest, devices[0], own, trust, refusal(manifest, trust), settings.precision)
        recorded = golden(directory, manifest)
        choice, first = select(source, settings, recorded, choices)
        manifest.verify_files(directory)  # what was loaded was verified as it was read
        many = choice.instances
        if many > asked:
            own, devices = 1, devices * many
            torch.set_num_threads(own)
        every = _instances(replace(source, threads=own), first, choice, recorded, devices)
    manifest = restricted(manifest, settings)  # first: nothing is compiled for layers that nobody may ask for
    readers = _readers(manifest, settings, every, recorded)
    manifest, note = _shown(source, manifest, first.eager, readers[0], recorded)
    for like in filter(None, (every[:many], every[many:])):
        _warm_up(like, recorded, settings.max_batch)
    runners = tuple(
        Runner(manifest, each.engines.chosen(each.choice, manifest), each.engines.eager, taps)
        for each, taps in zip(every, readers, strict=True)
    )
    warmup_ms = statistics.median(durations(runners[0].fast.run, golden_rows(recorded, 1), _TIMED_RUNS)) * 1000
    inline = _inline(runners[0].fast, directory, manifest, recorded, choice)
    memory.release()  # of what was read, and of engines that run nothing
    seconds, cards = time.perf_counter() - start, tuple(d.index for d in devices if d.type == "cuda")
    copies, alone = 1 if _shares(every[0].source) else many, next(iter(runners[many:]), None)
    return Loaded(
        manifest, settings, runners[:many], own, seconds, warmup_ms, note, str(choice), inline, cards, copies, alone
    )


def _inline(engine: Engine, directory: Path, manifest: Manifest, recorded: Golden, choice: Choice) -> Inline:
    """Return which batches of the engine are so short that the event loop may wait for them."""
    with _told(directory):
        batch, lengths = Batches(manifest, recorded).make, lengths_of(manifest.inputs)
        return inline_of(engine, directory, manifest, batch, choice.buckets.rows, lengths)


class _Instance(NamedTuple):
    """What an instance loads from and computes with, and which of its engines runs which batch."""

    source: Source
    choice: Choice
    engines: Engines


def _instances(
    source: Source, first: Engines, choice: Choice, recorded: Golden, devices: Sequence[torch.device]
) -> list[_Instance]:
    """Return the instances, of which the engines of the `first` are loaded, and last that for lone batches, if any."""
    every = [_Instance(source, choice, first)]
    for device in devices[1:]:
        if _shares(source):
            engines = first.twin(source, choice.used, recorded)
        else:
            engines = Engines.load(replace(source, device=device), choice.used, recorded, choice.buckets)
        every.append(_Instance(source, choice, engines))
    if choice.alone:
        whole = replace(source, threads=source.threads * len(devices))
        every.append(_Instance(whole, choice.alone, first.twin(whole, choice.alone.used, recorded)))
    return every


def _readers(
    manifest: Manifest, settings: ModelSettings, every: Sequence[_Instance], recorded: Golden
) -> list[Tapping | None]:
    """Return what reads the layers of `manifest` in each instance."""
    # A part of the program would give layers in float32.
    asked = "eager" if settings.precision == "bf16" else settings.engine
    programs = []
    for source, choice, _ in every:
        # A part of the program computes as the whole does: with as many threads as that was measured to be worth.
        threads = next((candidate.threads for candidate in choice.used if candidate.engine == "onnx"), source.threads)
        programs.append(tapping.program(source.directory, manifest, source.device, threads, asked))
    return tapping.readers([each.engines.eager for each in every], programs, recorded)


def _shares(source: Source) -> bool:
    """Tell whether instances share weights: a session's own threads compute one batch at a time, as a card's place."""
    return source.threads == 1 and source.device.type == "cpu"


def _shown(
    source: Source, manifest: Manifest, eager: EagerEngine | None, reader: Tapping | None, recorded: Golden
) -> tuple[Manifest, str]:
    """Return `manifest` with just the layers available that can be read, and a note on those that can't."""
    note = ""
    if source.untrusted and any(layer.available for layer in manifest.layers):
        manifest, note = tapping.without_module(manifest, reader, source.untrusted)
        logger.warning("%s: %s", manifest.name, note)
    if eager:
        manifest = without_silent(manifest, eager, recorded.inputs)
    return manifest, note


@contextmanager
def _told(directory: Path) -> Iterator[None]:
    """Turn what reading an artefact raises into a LoadError."""
    try:
        yield
    except (ValueError, OSError, RuntimeError, EngineError) as error:
        raise LoadError(_without_paths(str(error), directory)) from error


def choose_devices(name: str, instances: int) -> list[torch.device]:
    """Return the device of each instance for the setting `auto`, `cpu`, `cuda` or `cuda:1`.

    `cuda` takes all cards in turn. EngineError when CUDA, or just that card, is wanted and absent.
    """
    cards = 0 if name == "cpu" else cuda.count()
    kind, _, number = name.partition(":")
    if kind == "cuda" and not cards:
        raise EngineError(f"device is set to {name}, but torch finds no CUDA device here; set it to auto or cpu")
    if not cards:
        return [torch.device("cpu")] * instances
    if not number:
        return [torch.device("cuda", at % cards) for at in range(instances)]
    if int(number) >= cards:
        last = f" to cuda:{cards - 1}" if cards > 1 else ""
        raise EngineError(f"device is set to {name}, but torch finds only cuda:0{last} here; set it to one of these")
    return [torch.device("cuda", int(number))] * instances


def _warm_up(instances: Sequence[_Instance], recorded: Golden, rows: int) -> None:
    """Run the largest batch once on all at the same time: memory is taken now, or seen not to be there."""
    times = f", {len(instances)} times at once," if len(instances) > 1 else ""
    text = f"{rows} rows, which are max_batch, take{times} more memory than there is; set a lower max_batch"
    inputs, (source, choice, _) = golden_rows(recorded, rows), instances[0]
    for candidate in choice.used:
        with ThreadPoolExecutor(len(instances), "layercast-warm", processors.prepare, (source.threads,)) as pool:
            engines = [each.engines.fast[candidate] for each in instances]
            runs = [pool.submit(memory.within, partial(engine.run, inputs), lambda: text) for engine in engines]
        try:
            for run in runs:
                run.result()
        except OutOfMemory as error:
            raise LoadError(str(error)) from None


def _without_paths(text: str, directory: Path) -> str:
    return text.replace(f"{directory}/", "").replace(str(directory), directory.name).splitlines()[0]
