"""`layercast export`: writes models of the zoo, or a module of anyone's, as artefacts that the server loads."""

import _thread
import argparse
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from layercast.models import zoo
from layercast.models.commands import export_module, quantize
from layercast.models.commands.arguments import complain

if TYPE_CHECKING:
    from layercast.models.export.writer import Written
    from layercast.models.manifest import Manifest

_CLEAN_UP_SECONDS: Final = 10.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="models of the zoo, or one package.module:factory of an nn.Module"
    )
    parser.add_argument("--all", action="store_true", help="export every model of the zoo")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="write DIR/NAME/VERSION")
    parser.add_argument("--version", type=_version, default=1, metavar="N", help="version to write (default: 1)")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--force", action="store_true", help="replace a version that exists")
    existing.add_argument("--keep", action="store_true", help="leave a version that exists, without an error")
    parser.add_argument("--zoo", type=Path, default=zoo.ZOO, metavar="DIR", help="take models from this folder")
    quantize.add_arguments(parser)
    export_module.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Export the chosen models; return 0, 1 when one could not be exported, 2 for bad arguments."""
    if wrong := quantize.fault(args):
        return complain(wrong, 2)
    if export_module.is_asked_for(args):
        return _run_module(args)
    if given := export_module.given_options(args):
        return complain(f"{given[0]} goes with package.module:factory or --file, not with models of the zoo", 2)
    if bool(args.names) == args.all:
        return complain("name the models to export, or pass --all", 2)
    try:
        names = zoo.names(args.zoo) if args.all else list(dict.fromkeys(args.names))
        folders = [zoo.directory(name, args.zoo) for name in names]
    except ValueError as error:
        return complain(str(error), 2)
    if not folders:
        return complain(f"no model in {args.zoo}", 1)
    for folder in folders:
        target = args.output / folder.name / str(args.version)
        if args.keep and target.exists():
            continue
        try:
            _export(folder, target, args)
        except (ValueError, OSError) as error:
            if args.keep and target.exists():  # another process was faster
                continue
            return complain(str(error), 1)
    return 0


def _run_module(args: argparse.Namespace) -> int:
    if args.data is not None:
        return complain("--data goes with models of the zoo; calibrate this one with --calibration FILE.npz", 2)
    try:
        order = export_module.order_of(args)
    except export_module.UsageFault as error:
        return complain(str(error), 2)
    except (ValueError, OSError) as error:
        return complain(str(error), 1)
    target = args.output / order.name / str(args.version)
    if args.keep and target.exists():
        return 0
    from layercast.models.foreign.export import export_module as export
    from layercast.models.foreign.factory import NameFault
    from layercast.models.foreign.inputs import InputFault

    _one_thread()
    start = time.perf_counter()
    report = _Reporter(target)
    try:
        manifest = export(
            order, target, force=args.force, report=report,
            say=lambda line: print(" ".join(line.split()), flush=True),
            calibrate=lambda inputs: quantize.calibration_of(args, inputs, order.name),
        )  # fmt: skip
    except (ValueError, OSError) as error:
        if args.keep and target.exists():
            return 0
        return complain(str(error), 2 if isinstance(error, NameFault | InputFault) else 1)
    report.done(manifest, start)
    return 0


def _export(folder: Path, target: Path, args: argparse.Namespace) -> None:
    # Here, not above: --help and a refusal need no torch.
    from layercast.models.artefact import module_from_card
    from layercast.models.card import CARD_FILE, Card
    from layercast.models.export.staging import refuse_existing
    from layercast.models.export.writer import export_artefact

    _one_thread()
    refuse_existing(target, args.force)
    start = time.perf_counter()
    card = json.loads((folder / CARD_FILE).read_text(encoding="utf-8"))
    calibration = quantize.calibration_of(args, Card.check(card).inputs, card["name"])
    report = _Reporter(target)
    manifest = export_artefact(
        module_from_card(folder), card, target, force=args.force, report=report, calibration=calibration
    )
    report.done(manifest, start)


class _Reporter:
    """Prints a line for every program written to `target`, …/NAME/VERSION."""

    def __init__(self, target: Path) -> None:
        self._target = target
        self._label = f"{target.parent.name} {target.name}"

    def __call__(self, written: "Written") -> None:
        print(
            f"{self._label:<16} {written.program:<12} max difference {written.largest:.1e}  {written.seconds:.1f} s",
            flush=True,
        )

    def done(self, manifest: "Manifest", start: float) -> None:
        """Say what was written since `start`, on time.perf_counter's clock."""
        if manifest.int8:
            print(f"{self._label:<16} onnx-int8    {quantize.summary(manifest.int8)}", flush=True)
        size = sum(entry.bytes for entry in manifest.files.values()) / 1e6
        seconds = time.perf_counter() - start
        values = f" ({len(manifest.onnx_values)} in the ONNX program)" if "onnx" in manifest.programs else ""
        print(
            f"wrote {self._target}  {len(manifest.layers)} layers{values}, {size:.1f} MB, {seconds:.1f} s", flush=True
        )


def _one_thread() -> None:
    """Compute on one thread: where another process keeps the cores busy, threads that wait for each other take ten
    times as long, and these models are small.
    """
    import torch

    torch.set_num_threads(1)


def _version(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"want a whole number from 1, got {text!r}")
    return int(text)


def main() -> int:
    """Run the command on its own, as the zoo does in a process of its own."""
    parser = argparse.ArgumentParser(prog="layercast export", description=__doc__)
    add_arguments(parser)
    parser.add_argument("--until-stdin-ends", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.until_stdin_ends:
        threading.Thread(target=_end_with_stdin, daemon=True).start()
    try:
        return run(args)
    except KeyboardInterrupt:
        return 130


def _end_with_stdin() -> None:
    """End the process once whoever holds the other end of standard input is gone, without leaving half an artefact."""
    while os.read(0, 4096):
        pass
    _thread.interrupt_main()
    time.sleep(_CLEAN_UP_SECONDS)
    os._exit(130)


if __name__ == "__main__":
    sys.exit(main())
