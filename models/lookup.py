"""Finds the model that a name on a command line stands for, and inputs to run it on."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from layercast.models import artefact, registry, zoo
from layercast.models.card import CARD_FILE, Card
from layercast.models.examples import Examples
from layercast.models.foreign.trust import Trust
from layercast.models.manifest import MANIFEST_FILE, Manifest


class RequestError(ValueError):
    """What was asked for can't be had: no such name (the nearest follow), or arguments or inputs that don't fit it."""


@dataclass(frozen=True)
class Found:
    """A module in eval mode, what it was found as, and examples of its inputs (None where nothing says them)."""

    module: nn.Module
    described: str
    examples: Examples | None

    def inputs(self, rows: int = 1) -> dict[str, Tensor]:
        """Return inputs of `rows` rows, the longest the model takes; RequestError where nothing says which."""
        if self.examples is None:
            raise RequestError(
                f"{self.described} doesn't say what it takes; say it with --example, for instance "
                "--example 'image:float32[1,3,224,224]'"
            )
        return self.examples.make(rows, self.examples.lengths()[-1])


def find(name: str, arguments: Mapping[str, Any], trust: Trust) -> Found:
    """Return the model called `name`, built on the CPU. Code that an artefact names runs only if `trust` allows it.

    `name` is a model of the zoo, a registered architecture or `package.module:factory` (built with the constructor
    `arguments`), an artefact (a folder with a manifest) or a trained model (a folder with a card). RequestError for
    anything else and for arguments that don't fit; another ValueError where files are wrong.
    """
    if ":" in name or name in registry.architectures():
        return _built(name, arguments)
    trained = name in zoo.names()
    if arguments and (trained or Path(name).is_dir()):
        raise RequestError(f"{name} is built as its card or manifest says; arguments are for architectures")
    if trained:
        return _from_card(zoo.directory(name), f"{name} of the zoo")
    return _from_folder(Path(name), trust)


def _built(name: str, arguments: Mapping[str, Any]) -> Found:
    try:
        module = artefact.build(name, arguments, Trust.naming(name, is_file=False)).eval()
    except ValueError as error:
        raise RequestError(str(error)) from error
    specs = registry.input_specs(module)
    return Found(module, f"{name}, untrained", Examples(specs) if specs else None)


def _from_folder(folder: Path, trust: Trust) -> Found:
    if (folder / MANIFEST_FILE).is_file():
        manifest = Manifest.read(folder)
        described = f"artefact {manifest.name} {manifest.version}, {manifest.architecture}"
        return Found(artefact.load_module(folder, manifest, trust), described, Examples(manifest.inputs))
    if (folder / CARD_FILE).is_file():
        return _from_card(folder, f"trained model {folder}")
    if folder.is_dir():
        raise RequestError(f"{folder} holds neither {MANIFEST_FILE} (an artefact) nor {CARD_FILE} (a trained model)")
    known = [*zoo.names(), *registry.architectures()]
    near = difflib.get_close_matches(str(folder), known, n=3, cutoff=0.4) or known
    raise RequestError(f"no model, architecture or folder {str(folder)!r}; nearest: {', '.join(near)}")


def _from_card(folder: Path, described: str) -> Found:
    card = Card.read(folder)
    return Found(artefact.module_from_card(folder), f"{described}, {card.architecture}", Examples.of(card))
