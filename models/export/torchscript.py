"""TorchScript programs. The one place that calls torch.jit, whose every function says that it is deprecated."""

import io
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.jit._trace import TracerWarning

from layercast.models.export.checks import ExportError, module_at
from layercast.models.export.positional import Positional
from layercast.models.manifest import Manifest

_filters = threading.Lock()


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence torch.jit's deprecation, one thread at a time: Python keeps one list of filters for the process."""
    with _filters, warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning, message=r"`torch\.jit\.")
        yield


def write(module: Positional, inputs: Mapping[str, Tensor], path: Path, name: str) -> None:
    """Trace `module` on `inputs` into `path`; ExportError where the trace would freeze a value or a branch.

    The program keeps its weights as parameters, so that it can be moved to a device; `load_bytes` freezes it there.
    """
    try:
        with _quiet(), torch.no_grad():
            warnings.filterwarnings("error", category=TracerWarning)
            # torch's own checks of parameter shapes (an embedding's padding index): not a branch on values
            warnings.filterwarnings("ignore", category=TracerWarning, module=r"torch\.nn\.functional")
            program = torch.jit.trace(  # type: ignore[no-untyped-call]
                module, tuple(inputs.values()), check_trace=False
            )
            torch.jit.save(program, path)
    except TracerWarning as error:
        raise ExportError(
            f"{name}: a TorchScript trace would freeze what it saw in {module_at(error, module.module)}: "
            f"{str(error).splitlines()[0]}"
        ) from error
    except Exception as error:
        if isinstance(error.__cause__, TracerWarning):  # raised where torch is written in C++, which wraps it
            raise ExportError(
                f"{name}: a TorchScript trace would freeze what it saw in {module_at(error, module.module)}: "
                f"{str(error.__cause__).splitlines()[0]}"
            ) from error
        raise ExportError(
            f"{name}: tracing failed in {module_at(error, module.module)}: {type(error).__name__}: {error}"
        ) from error


def load(directory: Path | str, manifest: Manifest, device: str = "cpu") -> torch.jit.ScriptModule:
    """Load the verified program of an artefact. Call it with tensors in the order of the manifest's inputs."""
    return load_bytes(manifest.read_verified(directory, manifest.programs["torchscript"]), device)


def load_bytes(content: bytes, device: str = "cpu") -> torch.jit.ScriptModule:
    """Load and freeze a program from bytes that are trusted: torch.jit.load may unpickle code."""
    with _quiet():
        program = torch.jit.load(io.BytesIO(content), map_location=device)  # type: ignore[no-untyped-call]
        frozen: torch.jit.ScriptModule = torch.jit.freeze(program.eval())
        return frozen
