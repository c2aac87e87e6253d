"""The engines that one instance of a model runs on, and which of them runs which batch."""

import logging
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Self

import numpy as np
import torch

from layercast.models.artefact import Golden, to_numpy
from layercast.models.examples import Examples
from layercast.models.manifest import Manifest
from layercast.server.engines import instances, timing
from layercast.server.engines.base import Engine, EngineError, Inputs
from layercast.server.engines.choice import Buckets, Candidate, Choice, ChosenEngine
from layercast.server.engines.confined import Confined
from layercast.server.engines.eager import EagerEngine
from layercast.server.engines.golden import check_golden
from layercast.server.engines.inline import inline_of, lengths_of, may_run_inline
from layercast.server.engines.native.engine import NativeEngine
from layercast.server.engines.onnx import OnnxEngine
from layercast.server.engines.others import Others
from layercast.server.engines.programs import ProgramEngine
from layercast.server.engines.remembered import Remembered
from layercast.server.engines.source import Source
from layercast.server.settings import ModelSettings

logger = logging.getLogger(__name__)

_MANY: Final = 16
"""Requests of one row that the event loop runs together, if it is to run a model that several instances might."""


@dataclass(frozen=True)
class Engines:
    """What an instance runs on: the engines of candidates, and the eager one where it may be had."""

    fast: dict[Candidate, Engine]
    eager: EagerEngine | None

    @classmethod
    def load(cls, source: Source, candidates: Iterable[Candidate], recorded: Golden, buckets: Buckets) -> Self:
        """Load engines and let each reproduce the golden outputs; EngineError when that can't be.

        One on a kernel of our own, unless it is the only one, is left out then: for most weights it is exact enough.
        """
        eager = source.eager()
        engines = cls(source.engines(candidates, eager), eager)
        if eager and eager in engines.fast.values():
            eager.capture(buckets)
        if eager and eager not in engines.fast.values():
            check_golden(eager, recorded, source.manifest, source.precision)
        for candidate, engine in list(engines.fast.items()):
            try:
                check_golden(engine, recorded, source.manifest, source.precision)
            except EngineError as error:
                if not isinstance(engine, NativeEngine) or len(engines.fast) == 1:
                    raise
                logger.warning("%s: left out: %s", source.manifest.name, error)
                del engines.fast[candidate]
        return engines

    def twin(self, source: Source, candidates: Sequence[Candidate], recorded: Golden) -> Self:
        """Return the engines of these `candidates` for another instance on the host, all of which are here.

        Sessions and programs without a state run in several threads at once. A module is built anew, since hooks are
        put on it, and its forward may keep things; it shares the parameters.
        """
        eager = source.eager()
        if eager and self.eager:
            eager.share_parameters(self.eager)
        shared = {candidate: self.fast[candidate] for candidate in candidates if _is_stateless(self.fast[candidate])}
        own = source.engines([candidate for candidate in candidates if candidate not in shared], eager)
        for engine in dict.fromkeys([eager, *own.values()] if eager else own.values()):
            check_golden(engine, recorded, source.manifest, source.precision)
        return type(self)({candidate: (shared | own)[candidate] for candidate in candidates}, eager)

    def chosen(self, choice: Choice, manifest: Manifest) -> Engine:
        """Return the engine that runs every batch as `choice` says."""
        used = choice.used
        return self.fast[used[0]] if len(used) == 1 else ChosenEngine(choice, self.fast, manifest.inputs)


def _is_stateless(engine: Engine) -> bool:
    inner = engine.engine if isinstance(engine, Confined) else engine
    return isinstance(inner, OnnxEngine | NativeEngine) or (isinstance(inner, ProgramEngine) and inner.is_stateless)


def select(source: Source, settings: ModelSettings, recorded: Golden, folder: Path | None) -> tuple[Choice, Engines]:
    """Return which engine runs which batch, as measured now or read from `folder`, and the engines that do.

    EngineError when an engine that is asked for is not to be had, none is, or one gives other outputs than recorded.
    """
    manifest, candidates = source.manifest, source.candidates(settings)
    buckets = Buckets.of(manifest.inputs, settings.max_batch)
    if len(candidates) == 1 and (settings.instances or candidates[0].threads == source.threads):
        only = Choice.only(candidates[0], buckets, settings.instances or 1)
        return only, Engines.load(source, candidates, recorded, buckets)
    kept = Remembered(folder, manifest, source.device, candidates, buckets, settings)
    if known := kept.read():
        with suppress(EngineError):  # what can't be had is told where all are loaded
            engines = Engines.load(source, known.loaded, recorded, buckets)
            if engines.fast.keys() == set(known.loaded):
                logger.info("%s: %s, as measured before", manifest.name, known)
                return known, engines
    engines = Engines.load(source, candidates, recorded, buckets)
    choice = _measured(source, settings, engines, buckets, recorded, kept)
    # What runs nothing leaves memory; layers need the eager one.
    used = {candidate: engines.fast[candidate] for candidate in choice.loaded}
    if engines.eager and engines.eager not in used.values():
        engines.eager.forget_graphs()
    for engine in used.values():
        if isinstance(engine, NativeEngine):
            engine.shrink()
        if isinstance(engine, OnnxEngine):
            try:
                engine.shrink(golden_rows(recorded, 1))
            except Exception as error:  # of a program that takes only some sizes, say
                logger.info("%s: memory of %s is kept: %s", manifest.name, engine.name, type(error).__name__)
    return choice, Engines(used, engines.eager)


def _measured(
    source: Source, settings: ModelSettings, engines: Engines, buckets: Buckets, recorded: Golden, kept: Remembered
) -> Choice:
    """Return which of the `engines` runs which batch, as measured now, which is `kept`."""
    began, others = time.perf_counter(), Others()
    manifest, runs = source.manifest, {candidate: engine.run for candidate, engine in engines.fast.items()}
    here: set[Candidate] = set()
    if settings.instances < 2:  # several are handed their batches
        here = {one for one, engine in engines.fast.items() if may_run_inline(engine, source.directory, manifest)}
    choice, costs = timing.fastest(runs, Batches(manifest, recorded).make, buckets, source.threads, here)
    if settings.instances:
        choice = replace(choice, instances=settings.instances)
    elif several := _several(source, engines, choice, costs, recorded):
        choice = several
    busy = others.are_busy(source.threads)
    if busy:
        logger.warning("%s: engines were timed on a machine that was busy with something else", manifest.name)
    kept.write(choice, costs, busy)
    tried = ", ".join(map(str, runs))
    logger.info("%s: %s; measured %s in %.1f s", manifest.name, choice, tried, time.perf_counter() - began)
    return choice


def _several(source: Source, engines: Engines, one: Choice, costs: timing.Costs, recorded: Golden) -> Choice | None:
    """Return the choice for an instance a processor where these answer more than one that runs as `one` says."""
    manifest, count, buckets = source.manifest, source.threads, one.buckets
    if source.device.type != "cpu" or not 1 < count <= instances.MOST_TRIED:
        return None
    single, batch = engines.chosen(one, manifest), Batches(manifest, recorded).make
    shortest = lengths_of(manifest.inputs)[:1]
    inline = inline_of(single, source.directory, manifest, batch, buckets.rows, shortest)
    if inline.takes(enough := min(_MANY, buckets.rows[-1]), enough, shortest[0] if shortest else 0):
        return None  # its batches run on the event loop, which several instances would have to be handed
    single_threaded = [candidate for candidate in engines.fast if candidate.threads == 1]
    several = replace(timing.choose(single_threaded, buckets, costs), instances=count)
    team = instances.Team(count)
    try:
        run = engines.chosen(several, manifest).run
        gain = instances.gain(single.run, run, team, count, batch, buckets)
    finally:
        team.close()
        torch.set_num_threads(count)  # new threads are given what was set last anywhere
    logger.info("%s: %d instances of one thread answer %.2f times as much as one", manifest.name, count, gain)
    if gain <= instances.WORTH:
        return None
    return replace(several, alone=_alone(engines, one, several, manifest, batch))


def _alone(engines: Engines, alone: Choice, several: Choice, manifest: Manifest, batch: timing.Batch) -> Choice | None:
    """Return the choice for a batch beside which nothing runs, where that is clearly faster than as `several` says."""
    sizes = [
        (length, rows, mine != other)
        for length, own, others in zip(several.buckets.lengths, alone.cells, several.cells, strict=True)
        for rows, mine, other in zip(several.buckets.rows, own, others, strict=True)
    ]
    part = instances.part(engines.chosen(alone, manifest).run, engines.chosen(several, manifest).run, batch, sizes)
    logger.info("%s: alone, a batch takes %.2f of the time on %s", manifest.name, part, alone)
    return alone if part <= instances.SHORTER else None


def golden_rows(recorded: Golden, rows: int) -> Inputs:
    """Return the golden inputs, repeated or cut to `rows` rows."""
    return {name: np.resize(array, (rows, *array.shape[1:])) for name, array in recorded.inputs.items()}


class Batches:
    """Makes inputs to time engines with: the golden ones, or examples where a length is wanted."""

    def __init__(self, manifest: Manifest, recorded: Golden) -> None:
        self._examples = Examples(manifest.inputs)
        self._recorded = recorded

    def make(self, rows: int, length: int) -> Inputs:
        """Return a batch; ValueError when examples can't be made of the model's datatypes."""
        if not length:
            return golden_rows(self._recorded, rows)
        return {name: to_numpy(tensor) for name, tensor in self._examples.make(rows, length).items()}
