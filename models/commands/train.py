"""`layercast train NAME --data DIR`: train a model of the zoo and write its weights and card."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from layercast.models.training.loop import Epoch, Options

NAMES = ("mnist", "mlp", "resnet", "transformer")
_LARGEST_SEED = 1 << 32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `layercast train`."""
    parser.add_argument("name", choices=NAMES, help="which model of the zoo")
    add_data_arguments(parser)
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        default=Path("trained"),
        help="where NAME/ is written (default: ./trained)",
    )
    parser.add_argument("--epochs", type=_positive, metavar="N", help="train N epochs instead of the recipe's")
    parser.add_argument(
        "--patience",
        type=_positive,
        metavar="N",
        help="stop when the validation loss has not improved for N epochs (default: the recipe's, or never)",
    )
    parser.add_argument("--seed", type=_seed, help="seed of all randomness (default: the recipe's)")
    parser.add_argument(
        "--precision",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="of forward and backward; auto: bfloat16 on a GPU that has it, float32 elsewhere",
    )
    parser.add_argument("--fresh", action="store_true", help="start anew where an earlier run left a checkpoint")


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare where the data are."""
    parser.add_argument(
        "--data",
        required=True,
        metavar="DIR",
        help="folder with mnist/, cifar10/, sms_spam/; or `digits`: scikit-learn's digits, for mnist and mlp",
    )
    parser.add_argument("--download", action="store_true", help="fetch what is missing in DIR from its official home")


def run(args: argparse.Namespace) -> int:
    """Train, measure once on the test rows, write the card; Ctrl-C keeps the last epoch's checkpoint."""
    saved: Path = args.output / args.name / "checkpoint.pt"
    try:
        return _train(args, saved)
    except KeyboardInterrupt:
        kept = f"; {saved} keeps the epochs done, the same command goes on from there" if saved.exists() else ""
        print(f"layercast: interrupted{kept}", file=sys.stderr)
        return 130


def _train(args: argparse.Namespace, saved: Path) -> int:
    from layercast.models.training import card, loop
    from layercast.models.training.measure import confusion_matrix, figures
    from layercast.models.training.recipes import recipe as find_recipe

    changes = {"epochs": args.epochs, "patience": args.patience, "seed": args.seed}
    recipe = replace(find_recipe(args.name), **{key: value for key, value in changes.items() if value is not None})
    data = recipe.load_data(args.data, args.download)
    options = _options(args.precision, saved)
    if args.fresh:
        saved.unlink(missing_ok=True)
    elif saved.exists():
        print(f"going on from {saved}")
    print(
        f"training {recipe.name}: {len(data.train_inputs):,} rows of {data.name}, {recipe.epochs} epochs "
        f"on {options.device.type}"
    )
    with _Progress(recipe.epochs) as progress:
        trained = loop.train(recipe, data, options, progress.step, progress.epoch)
    predicted = loop.evaluate(recipe, trained.model, data.test_inputs, options.device).argmax(dim=1)
    measured = figures(confusion_matrix(predicted, data.test_targets, len(data.labels)), data.labels)
    card.write(saved.parent, recipe, data, trained.model, measured, trained.history, options.precision)
    print(
        f"best epoch {loop.best_epoch(trained.history) + 1}, test accuracy {measured['accuracy']:.2%}; "
        f"wrote weights, card, curves and figures to {saved.parent}"
    )
    return 0


def _options(precision: str, saved: Path) -> "Options":
    import torch

    from layercast.models.training.loop import Options

    if not torch.cuda.is_available():
        return Options(torch.device("cpu"), torch.bfloat16 if precision == "bfloat16" else torch.float32, saved)
    # The same seed gives the same weights only when no kernel adds up in the order in which threads arrive.
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    half = precision == "bfloat16" or (precision == "auto" and torch.cuda.is_bf16_supported())
    return Options(torch.device("cuda"), torch.bfloat16 if half else torch.float32, saved)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def _seed(text: str) -> int:
    number = int(text)
    if not 0 <= number < _LARGEST_SEED:
        raise argparse.ArgumentTypeError(f"must be 0 to {_LARGEST_SEED - 1}, got {number}")
    return number


class _Progress:
    """A bar on a terminal, a line an epoch elsewhere."""

    def __init__(self, epochs: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console()
        self._bar = Progress(
            BarColumn(),
            TextColumn("epoch {task.fields[epoch]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._plain = not console.is_terminal
        self._epochs = epochs
        self._task = self._bar.add_task("training", total=epochs, epoch=f"1/{epochs}", figures="")

    def __enter__(self) -> "_Progress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def step(self, epoch: int, step: int, steps: int) -> None:
        """Move the bar after a step."""
        self._bar.update(self._task, completed=epoch + (step + 1) / steps, epoch=f"{epoch + 1}/{self._epochs}")

    def epoch(self, done: "Epoch") -> None:
        """Show an epoch's figures."""
        figures = f"loss {done.loss:.4f}  validation loss {done.validation_loss:.4f}, {done.validation_accuracy:.2%}"
        self._bar.update(self._task, completed=done.epoch + 1, figures=figures)
        if self._plain:
            print(f"epoch {done.epoch + 1}/{self._epochs}  {figures}", flush=True)
