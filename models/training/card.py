"""Writes a trained model into a folder: weights, a card that says what it is and how good, curves and figures."""

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_model
from torch import nn

from layercast.models.data import Dataset
from layercast.models.training import pictures
from layercast.models.training.loop import Epoch, best_epoch
from layercast.models.training.recipes import Recipe


def write(
    directory: Path,
    recipe: Recipe,
    data: Dataset,
    model: nn.Module,
    measured: dict[str, Any],
    history: list[Epoch],
    precision: torch.dtype = torch.float32,
) -> None:
    """Write the trained model into `directory`, every file whole or not at all.

    `weights.safetensors`, `card.json` and `card.md`, `history.json` (the figures of every epoch), `curves.png` and
    `confusion.png`. `measured` are the test figures, as `measure.figures` gives them; `precision` is what forward and
    backward were computed in.
    """
    directory.mkdir(parents=True, exist_ok=True)
    plain = model.to(device="cpu", memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # missing from torch's stubs
    card = _card(recipe, data, model, measured, history)
    card["training"]["precision"] = str(precision).removeprefix("torch.")
    epochs = [{**asdict(epoch), "epoch": epoch.epoch + 1} for epoch in history]
    writers: dict[str, Callable[[Path], object]] = {
        "weights.safetensors": lambda path: save_model(plain, str(path)),
        "card.json": lambda path: path.write_text(json.dumps(card, indent=1) + "\n"),
        "card.md": lambda path: path.write_text(_markdown(card)),
        "history.json": lambda path: path.write_text(json.dumps(epochs, indent=1) + "\n"),
        "curves.png": lambda path: pictures.curves(recipe.name, history).save(path),
        "confusion.png": lambda path: pictures.confusion(recipe.name, measured["confusion"], data.labels).save(path),
    }
    for name, write_file in writers.items():
        staged = directory / f".partial.{name}"
        staged.touch()
        mode = staged.stat().st_mode
        write_file(staged)
        staged.chmod(mode)  # safetensors makes its file private
        os.replace(staged, directory / name)


def _card(
    recipe: Recipe, data: Dataset, model: nn.Module, measured: dict[str, Any], history: list[Epoch]
) -> dict[str, Any]:
    output_names: tuple[str, ...] = getattr(model, "output_names", ("output",))
    best = history[best_epoch(history)]
    return {
        "name": recipe.name,
        "description": recipe.description,
        "architecture": recipe.architecture,
        "arguments": dict(recipe.arguments),
        "labels": list(data.labels),
        "preprocessing": recipe.preprocessing(),
        "inputs": [recipe.input_spec(model)],
        "outputs": [{"name": output_names[0], "datatype": "FP32", "shape": [-1, len(data.labels)]}],
        "data": {
            "name": data.name,
            "licence": data.licence,
            "source": data.source,
            "train_rows": len(data.train_inputs),
            "test_rows": len(data.test_inputs),
        },
        "licence": "Apache-2.0",
        "metrics": measured,
        "training": {
            "epochs": len(history),
            "best_epoch": best.epoch + 1,
            "batch_size": recipe.batch_size,
            "optimiser": recipe.optimiser,
            "learning_rate": recipe.learning_rate,
            "warmup_epochs": recipe.warmup_epochs,
            "weight_decay": recipe.weight_decay,
            "label_smoothing": recipe.label_smoothing,
            "gradient_clip": recipe.gradient_clip,
            "augmentation": recipe.augment,
            "seed": recipe.seed,
            "validation_share": recipe.validation,
            "validation_accuracy": round(best.validation_accuracy, 4),
        },
    }


def _markdown(card: dict[str, Any]) -> str:
    data, metrics, training = card["data"], card["metrics"], card["training"]
    rows = "\n".join(
        f"| {label} | {f['precision']:.4f} | {f['recall']:.4f} | {f['f1']:.4f} |"
        for label, f in metrics["classes"].items()
    )
    settings = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in training.items())
    return f"""# {card["name"]}

{card["description"]}. Architecture `{card["architecture"]}`, arguments `{json.dumps(card["arguments"])}`.

Trained on {data["train_rows"]:,} rows of {data["name"]} ({data["source"]}; {data["licence"]}).
Test accuracy **{metrics["accuracy"]:.2%}** on {data["test_rows"]:,} test rows, looked at once, after training.
Weights: {card["licence"]}.

| class | precision | recall | F1 |
|---|---|---|---|
{rows}

![Confusion matrix on the test rows](confusion.png)
![Loss and validation accuracy by epoch](curves.png)

Training: {settings}. The weights are those of the epoch with the lowest validation loss.
"""
