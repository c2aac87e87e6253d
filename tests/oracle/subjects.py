"""The models under load, their rows, and the answers that an offline forward of one row at a time gives."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import card_of
from torch import nn

from layercast.models import registry
from layercast.models.export.writer import export_artefact

ROWS = 48
TOLERANCE = 1e-4
PADDING = 256
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Subject:
    """A served model: rows to send, and by version and output name the right answer to each of them."""

    name: str
    input: str
    datatype: str
    rows: list[Array]
    answers: dict[int, dict[str, list[Array]]]

    def batch(self, chosen: list[int]) -> Array:
        """Return the chosen rows as one tensor, texts padded to the longest."""
        picked = [self.rows[at] for at in chosen]
        if self.datatype != "INT64":
            return np.stack(picked)
        longest = max(len(row) for row in picked)
        return np.stack([np.pad(row, (0, longest - len(row)), constant_values=PADDING) for row in picked])

    def right(self, version: int, output: str, chosen: list[int]) -> Array:
        """Return what `version` must answer to the chosen rows."""
        return np.stack([self.answers[version][output][at] for at in chosen])


# Layers whose value of a row does not depend on how far the row is padded.
LAYERS = {"mnist": ["net.0", "net.4@l2norm"], "transformer": ["blocks.0@mean", "blocks.1@cls"]}


def subjects(repository: Path, versions: int = 2) -> dict[str, Subject]:
    """Export the models, version 1 alone, below `repository` and return them with the answers of every version.

    Further versions are exported beside, into `repository.parent/NAME.spare/NUMBER`, for tests that bring them in.
    """
    return {name: _subject(name, repository, versions) for name in LAYERS}


def _subject(name: str, repository: Path, versions: int) -> Subject:
    card = card_of(name)
    made = {number: _module(card, seed=100 + number) for number in range(1, versions + 1)}
    for number, module in made.items():
        place = repository / name if number == 1 else repository.parent / f"{name}.spare"
        export_artefact(module, card, place / str(number), programs=["onnx"])
    rows = _rows(card["inputs"][0])
    answers = {number: _answers(module, card, rows) for number, module in made.items()}
    subject = Subject(name, card["inputs"][0]["name"], card["inputs"][0]["datatype"], rows, answers)
    _assert_distinct(subject)
    return subject


def _module(card: dict[str, Any], seed: int) -> nn.Module:
    torch.manual_seed(seed)
    module = registry.build(card["architecture"], **card["arguments"])
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() > 1:  # so that answers to different rows lie far apart
                parameter.mul_(3)
    return module.eval()


def _rows(spec: dict[str, Any]) -> list[Array]:
    source = np.random.default_rng(7)
    if spec["datatype"] == "INT64":
        return [source.integers(0, PADDING, length) for length in source.integers(3, 33, ROWS)]
    return [source.random(spec["shape"][1:], dtype="f4") for _ in range(ROWS)]


def _answers(module: nn.Module, card: dict[str, Any], rows: list[Array]) -> dict[str, list[Array]]:
    """Answer one row at a time, with hooks written by hand."""
    layers = LAYERS[card["name"]]
    found: dict[str, list[Array]] = {name: [] for name in ("logits", *(f"layer:{layer}" for layer in layers))}
    seen: dict[str, Array] = {}
    for path in (layer.partition("@")[0] for layer in layers):
        module.get_submodule(path).register_forward_hook(
            lambda _module, _inputs, output, path=path: seen.update({path: output.clone().numpy()})
        )
    for row in rows:
        with torch.inference_mode():
            found["logits"].append(module(torch.from_numpy(row[None].copy())).numpy()[0])
        for layer in layers:
            path, _, reducer = layer.partition("@")
            found[f"layer:{layer}"].append(_reduced(seen[path][0], reducer))
    return found


def _reduced(values: Array, reducer: str) -> Array:
    """Reduce one row's layer by hand: [T, D] tokens or [D] units."""
    if reducer == "mean":
        return values.mean(axis=0)
    if reducer == "cls":
        return values[0]
    if reducer == "l2norm":
        return values / np.linalg.norm(values)
    return values


def _assert_distinct(subject: Subject) -> None:
    """Answers that are alike could be swapped unseen: every row and version must differ from every other."""
    for output in subject.answers[1]:
        every = np.stack([row for version in subject.answers.values() for row in version[output]]).reshape(
            len(subject.answers) * ROWS, -1
        )
        distances = np.abs(every[:, None] - every[None]).max(axis=2)
        np.fill_diagonal(distances, np.inf)
        assert distances.min() > 10 * TOLERANCE, f"{subject.name} {output}: {distances.min()}"
