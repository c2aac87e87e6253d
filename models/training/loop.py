"""The training loop: plain torch, seeded, resumable after every epoch."""

import json
import logging
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from layercast.models.data import Dataset, stratified
from layercast.models.registry import build
from layercast.models.training import augment, checkpoint, schedule
from layercast.models.training.batches import batches, batches_of_similar_length
from layercast.models.training.measure import logits_of
from layercast.models.training.recipes import Recipe, token_counts

logger = logging.getLogger(__name__)

IGNORED = -100
"""Target of a row that no loss counts."""

OnStep = Callable[[int, int, int], None]
"""Called with (epoch, step, steps an epoch) after every step."""


class TrainingError(ValueError):
    """Training cannot go on; the text says why and what to change."""


@dataclass(frozen=True)
class Epoch:
    """What one epoch gave: mean training loss; loss and accuracy on the validation rows; the rate it ended with."""

    epoch: int
    loss: float
    validation_loss: float
    validation_accuracy: float
    learning_rate: float


@dataclass(frozen=True)
class Options:
    """How, not what, to train: the device, the precision of forward and backward, and where to keep the checkpoint."""

    device: torch.device
    precision: torch.dtype = torch.float32
    checkpoint: Path | None = None


@dataclass
class Run:
    """A training in progress: the model, its optimiser, the epochs so far, and the weights of the best of them."""

    model: nn.Module
    optimiser: torch.optim.Optimizer
    history: list[Epoch]
    best: dict[str, Tensor]


def best_epoch(history: list[Epoch]) -> int:
    """Return the number of the epoch with the lowest validation loss, the later one of equals."""
    return min(reversed(history), key=lambda epoch: epoch.validation_loss).epoch


def train(recipe: Recipe, data: Dataset, options: Options, on_step: OnStep, on_epoch: Callable[[Epoch], None]) -> Run:
    """Train `recipe` on `data` and return the run, its model holding the best epoch's weights.

    The best epoch and the moment to stop are judged on validation rows held out of the training part; the test rows
    are not looked at. Continues from the checkpoint where there is one; CheckpointError when that belongs to other
    settings or data. The caller's random state is left as it was.
    """
    cuda = [options.device] if options.device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        kept, held = stratified(data.train_targets, recipe.validation, torch.Generator().manual_seed(recipe.seed))
        held = held[data.train_targets[held] != IGNORED]
        rows = data.train_inputs[kept], data.train_targets[kept]
        identity = {"recipe": json.loads(json.dumps(asdict(recipe))), "data": data.fingerprint()}
        run = _start(recipe, options, identity)
        while not _finished(recipe, run.history):
            epoch = len(run.history)
            loss = _epoch(recipe, run, options, rows, epoch, on_step)
            figures = _validate(recipe, run.model, (data.train_inputs[held], data.train_targets[held]), options.device)
            run.history.append(Epoch(epoch, loss, *figures, run.optimiser.param_groups[0]["lr"]))
            if best_epoch(run.history) == epoch:
                run.best = {name: tensor.detach().cpu().clone() for name, tensor in run.model.state_dict().items()}
            if options.checkpoint:
                checkpoint.save(_state(run, identity), options.checkpoint)
            on_epoch(run.history[-1])
        run.model.load_state_dict(run.best)
    return run


def _finished(recipe: Recipe, history: list[Epoch]) -> bool:
    if not history:
        return False
    return len(history) >= recipe.epochs or 0 < recipe.patience < len(history) - best_epoch(history)


def _start(recipe: Recipe, options: Options, identity: dict[str, Any]) -> Run:
    torch.manual_seed(recipe.seed)
    model = build(recipe.architecture, **recipe.arguments).to(options.device)
    if recipe.augment == "photos":
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing from torch's stubs
    run = Run(model, schedule.optimiser(recipe, model), [], {})
    state = checkpoint.load(options.checkpoint) if options.checkpoint else None
    if state is not None:
        _check_same(state, identity, options.checkpoint)
        model.load_state_dict(state["model"])
        run.optimiser.load_state_dict(state["optimiser"])
        run.history = [Epoch(**entry) for entry in state["history"]]
        run.best = state["best"]
    return run


def _state(run: Run, identity: dict[str, Any]) -> dict[str, Any]:
    return {
        **identity,
        "model": run.model.state_dict(),
        "optimiser": run.optimiser.state_dict(),
        "history": [asdict(epoch) for epoch in run.history],
        "best": run.best,
    }


def _check_same(state: dict[str, Any], identity: dict[str, Any], path: Path | None) -> None:
    if {"data", "recipe", "model", "optimiser", "history", "best"} - state.keys():
        raise checkpoint.CheckpointError(f"{path}: want a checkpoint of ours; delete it or use --fresh")
    wanted, got = identity["recipe"], state["recipe"]
    different = [f"{key} {got.get(key)!r}, now {wanted[key]!r}" for key in wanted if wanted[key] != got.get(key)]
    if state["data"] != identity["data"]:
        different.append("other training data")
    if different:
        raise checkpoint.CheckpointError(
            f"{path} is of a training with {'; '.join(different)}; use --fresh to start anew, or another --output"
        )


def _augmented(recipe: Recipe, rows: Tensor, epoch: int, generator: torch.Generator) -> Tensor:
    if recipe.augment == "text":
        return recipe.prepare(augment.text(rows, generator))
    images = rows.float() / 255
    if recipe.augment == "digits":
        return recipe.arrange(augment.digits(images, generator))
    return recipe.arrange(augment.photos(images, generator, recipe.crop_size(epoch)))


def _epoch(
    recipe: Recipe, run: Run, options: Options, rows: tuple[Tensor, Tensor], epoch: int, on_step: OnStep
) -> float:
    """Train one epoch and return the mean loss. All randomness is from (seed, epoch): a resumed run is the same run."""
    torch.manual_seed(recipe.seed * 100_003 + epoch)
    generator = torch.Generator().manual_seed(recipe.seed * 100_003 + epoch)
    inputs, targets = rows
    if recipe.augment == "text":
        plan = batches_of_similar_length(token_counts(inputs), recipe.batch_size, generator)
    else:
        plan = batches(len(inputs), recipe.batch_size, generator)
    run.model.train()
    losses = []
    for step, chosen in enumerate(plan):
        for group in run.optimiser.param_groups:
            group["lr"] = schedule.learning_rate(recipe, epoch + (step + 0.5) / len(plan))
        batch = _augmented(recipe, inputs[chosen], epoch, generator)
        if bool((targets[chosen] != IGNORED).any()):
            losses.append(_step(recipe, run, options, batch, targets[chosen]))
        else:  # torch's mean over nothing is NaN, and a step on it would spoil every weight
            logger.warning("epoch %d, step %d: every target is to be ignored; the batch is skipped", epoch, step)
        on_step(epoch, step, len(plan))
    mean = float(torch.stack(losses).mean()) if losses else 0.0
    if not math.isfinite(mean):
        raise TrainingError(f"the loss became {mean} in epoch {epoch + 1}; lower the learning rate")
    return mean


def _step(recipe: Recipe, run: Run, options: Options, batch: Tensor, targets: Tensor) -> Tensor:
    """Take one optimiser step and return the loss, a detached scalar left on the device."""
    reduced = options.precision != torch.float32
    with torch.autocast(options.device.type, options.precision if reduced else None, enabled=reduced):
        logits = run.model(batch.to(options.device))
    loss = functional.cross_entropy(
        logits.float(), targets.to(options.device), label_smoothing=recipe.label_smoothing, ignore_index=IGNORED
    )
    run.optimiser.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]  # untyped in torch
    nn.utils.clip_grad_norm_(run.model.parameters(), recipe.gradient_clip)
    run.optimiser.step()
    return loss.detach()


def _validate(
    recipe: Recipe, model: nn.Module, rows: tuple[Tensor, Tensor], device: torch.device
) -> tuple[float, float]:
    """Return (mean cross entropy, accuracy) of the model in eval mode."""
    inputs, targets = rows
    logits = evaluate(recipe, model, inputs, device)
    return float(functional.cross_entropy(logits, targets)), float((logits.argmax(dim=1) == targets).double().mean())


def evaluate(recipe: Recipe, model: nn.Module, inputs: Tensor, device: torch.device) -> Tensor:
    """Return the logits [N, C], float32 on the CPU, that `model` in eval mode gives rows of the data set."""
    model.eval()
    with torch.inference_mode():
        return logits_of(lambda rows: model(recipe.prepare(rows).to(device)).float().cpu(), inputs)
