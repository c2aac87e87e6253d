"""How each model of the zoo is trained: one frozen recipe a name."""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from layercast.models.data import Dataset
from layercast.models.data.cifar import load_cifar10
from layercast.models.data.digits import load_digits
from layercast.models.data.idx import load_mnist
from layercast.models.data.sources import fetch
from layercast.models.data.text import PADDING, load_sms_spam
from layercast.models.registry import input_specs

_PIXEL = 1 / 255


def token_counts(rows: Tensor) -> Tensor:
    """Return how many tokens of every row [N, T] are not padding, int64 [N]."""
    return (rows != PADDING).sum(dim=1)


@dataclass(frozen=True)
class Recipe:
    """Everything that determines a trained model besides the data."""

    name: str
    description: str
    architecture: str
    data: Literal["mnist", "cifar10", "sms_spam"]
    augment: Literal["digits", "photos", "text"]
    epochs: int
    batch_size: int
    learning_rate: float
    optimiser: Literal["adamw", "sgd"]
    weight_decay: float
    arguments: Mapping[str, Any] = field(default_factory=dict)
    label_smoothing: float = 0.0
    warmup_epochs: float = 1.0
    gradient_clip: float = 1.0
    validation: float = 0.05
    patience: int = 0
    """Stop when the validation loss has not improved for this many epochs; 0: never."""
    seed: int = 0
    crop_sizes: tuple[tuple[float, int], ...] = ()
    """For photos: (fraction of training, crop size); small crops first make early epochs cheap."""

    def crop_size(self, epoch: int) -> int:
        """Return the crop size of `epoch` (0-based)."""
        for until, size in self.crop_sizes:
            if epoch < until * self.epochs:
                return size
        return 32

    def load_data(self, where: str, download: bool = False, say: Callable[[str], None] = print) -> Dataset:
        """Read this recipe's data set from its folder below the directory `where`; `digits` is scikit-learn's digits.

        With `download`, files that are missing are fetched first; `say` is told each line. DataError when the data
        cannot be had or are not what they should be.
        """
        if where == "digits":
            return load_digits(self.data)
        folder = Path(where) / self.data
        if download:
            fetch(self.data, folder, say)
        if self.data == "mnist":
            return load_mnist(folder)
        if self.data == "cifar10":
            return load_cifar10(folder)
        return load_sms_spam(folder, self.arguments["max_length"])

    def prepare(self, rows: Tensor) -> Tensor:
        """Return rows of the data set as the model takes them: images as floats in 0 to 1, texts cut to the longest."""
        if self.data == "sms_spam":
            return rows[:, : max(1, int(token_counts(rows).max()))]
        return self.arrange(rows.float() / 255)

    def arrange(self, images: Tensor) -> Tensor:
        """Return float images [N, C, H, W] in the model's layout."""
        if self.architecture == "MLP":
            return images.flatten(1)
        return images.contiguous(memory_format=torch.channels_last) if self.data == "cifar10" else images

    def preprocessing(self) -> dict[str, Any]:
        """Describe how a picture or a text becomes the model's input, for clients."""
        if self.data == "sms_spam":
            length = self.arguments["max_length"]
            return {"kind": "text", "encoding": "utf-8", "pad": 256, "max_length": length, "overlong": "cut"}
        if self.data == "cifar10":
            return {"kind": "image", "mode": "RGB", "width": 32, "height": 32, "scale": _PIXEL, "layout": "CHW"}
        layout = "FLAT" if self.architecture == "MLP" else "CHW"
        size = {"width": 28, "height": 28, "scale": _PIXEL}
        return {"kind": "image", "mode": "L", **size, "layout": layout, "background": "dark"}

    def input_spec(self, model: nn.Module) -> dict[str, Any]:
        """Return the one input of a `model` of this recipe, as the card and the manifest describe it."""
        (spec,) = input_specs(model)
        pixels = {} if self.data == "sms_spam" else {"range": [0, 1]}
        return {**spec.model_dump(mode="json"), **pixels}


_DIGITS: dict[str, Any] = {
    "data": "mnist",
    "augment": "digits",
    "epochs": 120,
    "batch_size": 128,
    "learning_rate": 2e-3,
    "optimiser": "adamw",
    "weight_decay": 1e-2,
    "label_smoothing": 0.02,
    "arguments": {"dropout": 0.1},
}

RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            name="mnist",
            description="Handwritten digits, 784-512-256-10",
            architecture="MNISTClassifier",
            **_DIGITS,
        ),
        Recipe(
            name="mlp",
            description="Handwritten digits, 784-512-256-128-10",
            architecture="MLP",
            **_DIGITS,
        ),
        Recipe(
            name="resnet",
            description="Ten kinds of object in 32×32 colour pictures",
            architecture="ResNetLike",
            data="cifar10",
            augment="photos",
            epochs=64,
            batch_size=128,
            learning_rate=0.2,
            optimiser="sgd",
            weight_decay=5e-4,
            label_smoothing=0.1,
            warmup_epochs=2.0,
            gradient_clip=5.0,
            validation=0.02,
            crop_sizes=((0.35, 24), (0.65, 28)),
        ),
        Recipe(
            name="transformer",
            description="Spam or not: short messages, byte by byte",
            architecture="TransformerEncoder",
            data="sms_spam",
            augment="text",
            epochs=12,
            batch_size=32,
            learning_rate=1e-3,
            optimiser="adamw",
            weight_decay=0.05,
            arguments={
                "max_length": 192,
                "embed_dim": 64,
                "num_heads": 4,
                "ff_dim": 128,
                "num_blocks": 2,
                "dropout": 0.1,
            },
            warmup_epochs=1.0,
            validation=0.1,
        ),
    )
}


def recipe(name: str) -> Recipe:
    """Return the recipe called `name`; ValueError with the nearest names when there is none."""
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"no recipe for {name!r}{hint} Known: {', '.join(RECIPES)}")
    return RECIPES[name]
