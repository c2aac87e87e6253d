"""torch.export programs: capture with a dynamic batch, write, load."""

import io
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export.passes import move_to_device_pass

from layercast.models.export.archive import refuse_pickles
from layercast.models.export.checks import ExportError, describe, module_at
from layercast.models.export.operators import check_captured
from layercast.models.export.positional import Positional
from layercast.models.manifest import Manifest, TensorSpec

EXAMPLE_BATCH = 3
"""Rows to capture with: torch fixes sizes 0 and 1, and 2 is too likely to meet another dimension of that size."""


def capture(
    module: Positional, inputs: Mapping[str, Tensor], specs: Sequence[TensorSpec], name: str
) -> ExportedProgram:
    """Capture `module` as a graph with the batch and every dynamic dimension free; ExportError if one cannot be."""
    try:
        with warnings.catch_warnings():
            # torch's own use of a deprecated class of its own
            warnings.filterwarnings("ignore", category=FutureWarning, message=".*LeafSpec.*")
            program = torch.export.export(
                module, tuple(inputs.values()), dynamic_shapes=(dynamic_shapes(specs),), strict=False
            )
    except Exception as error:
        frozen = _freezes(module, inputs, specs)
        if frozen is not None:
            raise ExportError(
                f"{name}: {describe(module.module, frozen)} takes the batch size or a length as a constant; compute "
                f"with x.shape[0] as it is, without int(), .item(), a list over rows, or a branch on it"
            ) from error
        raise ExportError(
            f"{name}: torch.export failed in {module_at(error, module.module)}: {_essence(error)}; the usual "
            f"causes are a size taken as a constant and a branch on values"
        ) from error
    check_captured(program, name)
    return program


def _freezes(module: Positional, inputs: Mapping[str, Tensor], specs: Sequence[TensorSpec]) -> str | None:
    """Capture again and return the path of the first module after which a free size is a constant, None if none is."""
    paths = {part: path for path, part in module.module.named_modules()}
    given: list[Tensor] = []
    found: list[str] = []

    def enter(_: nn.Module, tensors: tuple[Tensor, ...]) -> None:
        given[:] = tensors

    def leave(part: nn.Module, _: object, __: object) -> None:
        sizes = [tensor.shape[place] for tensor, free in zip(given, places, strict=True) for place in free]
        if not found and any(_constant(size) for size in sizes):
            found.append(paths[part])

    places = dynamic_shapes(specs)
    handles = [module.register_forward_pre_hook(enter)]
    handles += [part.register_forward_hook(leave, always_call=True) for part in paths]
    try:
        torch.export.export(module, tuple(inputs.values()), dynamic_shapes=(places,), strict=False)
    except Exception:
        return found[0] if found else None
    finally:
        for handle in handles:
            handle.remove()
    return None


def _constant(size: int | torch.SymInt) -> bool:
    return not isinstance(size, torch.SymInt) or size.node.maybe_as_int() is not None


def dynamic_shapes(specs: Sequence[TensorSpec]) -> tuple[dict[int, Any], ...]:
    """Return the free dimensions of each input: `batch` is shared by all, others by inputs with the same place."""
    batch = Dim("batch", min=1)
    places = sorted({index for spec in specs for index in spec.dynamic_dimensions()})
    longest = {
        place: min((s.max_length for s in specs if s.max_length and place in s.dynamic_dimensions()), default=None)
        for place in places
    }
    sizes = {
        place: Dim("length" if len(places) == 1 else f"length_{place}", min=1, max=longest[place]) for place in places
    }
    return tuple({0: batch, **{place: sizes[place] for place in spec.dynamic_dimensions()}} for spec in specs)


def write(program: ExportedProgram, path: Path) -> None:
    """Write `program` to `path`."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, message=".*LeafSpec.*")
        torch.export.save(program, path)


def load(directory: Path | str, manifest: Manifest, device: str = "cpu") -> nn.Module:
    """Load the verified program of an artefact. Call it with tensors in the order of the manifest's inputs."""
    return load_bytes(manifest.read_verified(directory, manifest.programs["exported"]), device)


def load_bytes(content: bytes, device: str = "cpu") -> nn.Module:
    """Load a program from bytes that are trusted: torch.export.load runs what they say, pickles apart.

    TorchFileError for an archive in which something is pickled that is not plain tensors.
    """
    refuse_pickles(content)
    program = torch.export.load(io.BytesIO(content))
    if device != "cpu":
        program = move_to_device_pass(program, device)
    return program.module()


def _essence(error: BaseException) -> str:
    """Return the first line of torch's message, which goes on for pages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
