"""What runs a batch: the contract every engine keeps."""

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from layercast.server.work import Array, Tap

Inputs = Mapping[str, Array]
Outputs = dict[str, Array]


class EngineError(Exception):
    """An engine can't be loaded on this machine; the text says why."""


class Engine(Protocol):
    """Runs the model of one artefact. Called by one thread at a time; inputs may be read-only and are never changed.

    `name` is the engine's (`eager`, `torchscript`, `onnx`, `onnx-int8`, `exported`, `winograd`, `encoder`), `device`
    where it really runs (`cpu`, `cuda`).
    """

    name: str
    device: str

    def run(self, inputs: Inputs) -> Outputs:
        """Return every output by name for the batch `inputs`: arrays by input name, all with the same dimension 0."""


class Tapping(Protocol):
    """Reads layers of the model of one artefact. Called like an Engine; `name` is what read those of the last batch."""

    @property
    def name(self) -> str:
        """`eager` or `onnx`."""

    def tapped(self, inputs: Inputs, taps: Sequence[Tap], predict: bool) -> tuple[Outputs, dict[Tap, Array]]:
        """Return the outputs (none unless `predict`) and the values of `taps` from one forward over the batch.

        InvalidArgument when a reducer does not fit the values of its layer.
        """


@contextmanager
def in_memory(content: bytes) -> Iterator[str]:
    """Yield the path of a file that holds `content`, in memory where the system can, and is gone afterwards.

    ONNX Runtime reads a path without Python's lock, but copies bytes with it: 0.9 s for 400 MB in which nothing was
    answered, against 0.05 s.
    """
    if not hasattr(os, "memfd_create") or not Path("/proc/self/fd").is_dir():  # only Linux has both
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "program"
            path.write_bytes(content)
            yield str(path)
        return
    with open(os.memfd_create("layercast"), "wb") as file:
        file.write(content)
        file.flush()
        yield f"/proc/self/fd/{file.fileno()}"


def not_loaded(program: str, error: Exception, path: str = "") -> EngineError:
    """Return the error for a program that its runtime refuses to load; runtimes say at most a `path` of our making."""
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else ""
    if path:
        text = text.replace(path, program).replace(str(Path(path).parent), "its folder")
    return EngineError(f"{program} can't be loaded: {type(error).__name__}: {text}"[:500])
