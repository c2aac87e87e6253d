"""Choices that were measured, kept between starts: a file each, named by all that a choice depends on."""

import hashlib
import json
import logging
import math
import os
import platform
import tempfile
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import torch

from layercast.models.manifest import Manifest
from layercast.models.versions import tool_versions
from layercast.server.engines import cuda
from layercast.server.engines.choice import Buckets, Candidate, Choice
from layercast.server.engines.timing import Costs
from layercast.server.settings import MOST_INSTANCES, ModelSettings

logger = logging.getLogger(__name__)

_FORMAT: Final = 9
_BUSY_STARTS: Final = 3
"""Starts in a row, on a machine that is busy with something else, after which what was measured last is kept."""
_MOST: Final = 512
"""Files that are kept; the oldest go."""


class Remembered:
    """The choice of one artefact on this machine: in `folder`, or nowhere when that is None.

    Of the `settings`, the instances asked for matter, 0 where they are part of the choice, and the precision.
    """

    def __init__(
        self,
        folder: Path | None,
        manifest: Manifest,
        device: torch.device,
        candidates: list[Candidate],
        buckets: Buckets,
        settings: ModelSettings,
    ) -> None:
        self._candidates = candidates
        self._settings = settings
        self._buckets = buckets
        self._busy_starts = 0
        self._path = folder / f"{manifest.name}-{self._key(manifest, device)}.json" if folder else None

    def read(self) -> Choice | None:
        """Return the choice that was kept; None when there is none, none that can be read, or one to measure again."""
        if self._path is None:
            return None
        try:
            content = json.loads(self._path.read_bytes())
            cells, instances = self._cells(content["cells"]), content["instances"]
            alone = self._cells(content["alone"]) if content["alone"] else None
            busy_starts = int(content["busy_starts"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            logger.warning("the engines chosen before can't be read and are timed again: %s", type(error).__name__)
            return None
        wanted = [len(self._buckets.rows)] * len(self._buckets.lengths)
        right = all([len(row) for row in table] == wanted for table in (cells, alone) if table is not None)
        if not right or type(instances) is not int or not 1 <= instances <= MOST_INSTANCES:
            logger.warning("the engines chosen before are not those of this model and are timed again")
            return None
        if 0 < busy_starts < _BUSY_STARTS:
            logger.info("the engines chosen before were timed on a busy machine and are timed again")
            self._busy_starts = busy_starts
            return None
        return Choice(self._buckets, cells, instances, Choice(self._buckets, alone) if alone else None)

    def write(self, choice: Choice, costs: Costs, busy: bool) -> None:
        """Keep `choice`, with what it rests on for whoever reads the file. That it can't be kept is only logged.

        What was measured on a machine that was `busy` is measured again at the next starts, until it is not, or a few
        times.
        """
        if self._path is None:
            return
        measured = [
            {"length": length, "rows": rows, "microseconds": _microseconds(cost)}
            for (length, rows), cost in costs.items()
        ]
        content = {
            "chosen": str(choice),
            "instances": choice.instances,
            "busy_starts": self._busy_starts + 1 if busy else 0,
            "cells": choice.cells,
            "alone": choice.alone.cells if choice.alone else None,
            "measured": measured,
        }
        text = json.dumps(content, indent=1)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            _replace(self._path, text)
            _prune(self._path.parent)
        except OSError as error:
            logger.warning("the engines chosen can't be kept for the next start: %s", error.strerror or error)

    def _cells(self, rows: list[list[list[Any]]]) -> tuple[tuple[Candidate, ...], ...]:
        """Return cells as JSON has them; ValueError or TypeError for what is none of the candidates."""
        return tuple(tuple(self._candidates[self._candidates.index(Candidate(*cell))] for cell in row) for row in rows)

    def _key(self, manifest: Manifest, device: torch.device) -> str:
        depends = {
            "format": _FORMAT,
            "files": {name: manifest.files[name].sha256 for name in sorted(manifest.files)},
            "machine": _machine(device),
            "tools": tool_versions(),
            "candidates": self._candidates,
            "instances": self._settings.instances,
            "precision": self._settings.precision,
            "buckets": asdict(self._buckets),
        }
        return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:16]


def _microseconds(cost: dict[Candidate, float]) -> dict[str, float]:
    return {str(candidate): round(1e6 * seconds, 1) for candidate, seconds in cost.items() if math.isfinite(seconds)}


def _replace(path: Path, text: str) -> None:
    """Write beside `path` and rename, so that a reader finds the old file or the new one."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False, encoding="utf-8") as file:
        staged = Path(file.name)
        try:
            file.write(text)
            file.close()
            os.replace(staged, path)
        except BaseException:
            staged.unlink(missing_ok=True)
            raise


def _prune(folder: Path) -> None:
    files = sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime)
    for path in files[:-_MOST]:
        with suppress(FileNotFoundError):  # another server's start does the same
            path.unlink()


def _machine(device: torch.device) -> list[str]:
    """Say what computes: the model of the processor, and of the GPU where that is used."""
    found = [platform.machine(), platform.processor()]
    with suppress(OSError):  # only Linux has the file
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        # The first processor's, which the others are like.
        found += [next((line for line in lines if line.startswith(key)), "") for key in ("model name", "flags")]
    return found if device.type == "cpu" else [*found, cuda.name(device.index)]
