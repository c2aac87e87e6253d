"""The manifest of an artefact: everything about an exported model that can be known without loading it.

Reading one needs no torch, so that clients, repositories and deployment tools can use it.
"""

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal, NoReturn, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    PrivateAttr,
    ValidationError,
    field_validator,
    model_validator,
)

SCHEMA_VERSION: Final = 2
_READ_VERSIONS: Final = (1, SCHEMA_VERSION)
"""Version 2 brought `onnx_values`."""

MANIFEST_FILE: Final = "manifest.json"
WEIGHTS_FILE: Final = "weights.safetensors"
GOLDEN_FILE: Final = "golden.safetensors"
PROGRAM_FILES: Final = {
    "torchscript": "model.ts",
    "onnx": "model.onnx",
    "exported": "model.pt2",
    "onnx-int8": "model.int8.onnx",
}

DATATYPES: Final = (
    "BOOL",
    "UINT8", "UINT16", "UINT32", "UINT64",
    "INT8", "INT16", "INT32", "INT64",
    "FP16", "FP32", "FP64", "BF16",
    "BYTES",
)  # fmt: skip
"""Datatypes of the Open Inference Protocol."""

Program = Literal["torchscript", "onnx", "exported", "onnx-int8"]


class ManifestError(ValueError):
    """A manifest or a file it lists is not what it should be; the text names the file and the key."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class TensorSpec(_Strict):
    """An input or output. In `shape`, -1 at dimension 0 is the batch, any other -1 a dynamic dimension.

    `range` is where the values lie, both ends included: a server refuses whole numbers outside it, which would index
    past a table, and warns of floats outside it, which the model was not trained on. `pad` is the padding value of a
    token input, `max_length` the largest size of its dynamic dimension.
    """

    name: str = Field(min_length=1)
    datatype: str
    shape: tuple[int, ...] = Field(min_length=1)
    range: tuple[float, float] | None = None
    pad: int | None = None
    max_length: int | None = Field(default=None, ge=1)

    @field_validator("datatype")
    @classmethod
    def _known(cls, datatype: str) -> str:
        if datatype not in DATATYPES:
            raise ValueError(f"unknown datatype {datatype!r}; known: {', '.join(DATATYPES)}")
        return datatype

    @field_validator("shape")
    @classmethod
    def _batched(cls, shape: tuple[int, ...]) -> tuple[int, ...]:
        if shape[0] != -1:
            raise ValueError(f"dimension 0 must be -1 (the batch), got {shape[0]}")
        if any(size != -1 and size < 1 for size in shape):
            raise ValueError(f"every dimension must be -1 (dynamic) or at least 1, got {list(shape)}")
        return shape

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.range is not None and self.range[0] > self.range[1]:
            raise ValueError(f"range must be [low, high], got {list(self.range)}")
        return self

    def dynamic_dimensions(self) -> tuple[int, ...]:
        """Return the dimensions besides the batch whose size a caller chooses."""
        return tuple(index for index, size in enumerate(self.shape) if index and size == -1)

    @property
    def is_mask(self) -> bool:
        """Whether the values are zeros and ones, padded with zeros, that tell which tokens of a row count."""
        return self.pad == 0 and self.range == (0, 1)


class LayerSpec(_Strict):
    """One tensor that a module inside the model returns.

    `path` is the dotted module path, with `#k` for the k-th of several calls and `[key]` for a part of a tuple or
    dict. `order` counts completed calls from 0. `clone` says that a later in-place operation changes the tensor. A
    layer that cannot be tapped has `available` False, a `reason`, order -1 and no shape.
    """

    path: str = Field(min_length=1)
    type: str
    shape: tuple[int, ...] = ()
    datatype: str = ""
    order: int = -1
    parameters: int = Field(default=0, ge=0)
    clone: bool = False
    available: bool = True
    reason: str = ""


class FileEntry(_Strict):
    """Size and digest of one file of the artefact."""

    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    bytes: int = Field(ge=0)


class Int8(_Strict):
    """What the program `onnx-int8` costs, against the program `onnx`, measured on rows that did not calibrate it.

    `method` is `static` (the ranges of activations were recorded from `calibration_rows` rows of `data`) or `dynamic`
    (they are found for every batch, and no row calibrates). Differences are absolute, over all outputs. `agreement` is
    the share of rows whose largest class score is of the same class, None where the first output is no [N, C].
    `accuracy` of both programs is there where the rows had targets. `tolerance` is how far the program may be from the
    golden outputs.
    """

    method: Literal["static", "dynamic"]
    data: str
    calibration_rows: int = Field(ge=0)
    measured_rows: int = Field(ge=1)
    largest_difference: float = Field(ge=0)
    mean_difference: float = Field(ge=0)
    agreement: float | None = Field(default=None, ge=0, le=1)
    accuracy: dict[Literal["onnx", "onnx-int8"], float] = {}
    tolerance: float = Field(gt=0)


class Manifest(_Strict):
    """Contents of `manifest.json`. Every file name in it is a plain name inside the artefact's directory.

    `architecture` is a name of the registry, `package.module:factory` of an installed package, or, with the source
    file in `code`, `net.py:factory`. `onnx_values` tells which value inside the program `onnx` carries a layer, by the
    layer's path; a layer that is not in it has none.
    """

    schema_version: Literal[1, 2] = SCHEMA_VERSION
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    version: int = Field(ge=1)
    description: str = ""
    architecture: str = Field(min_length=1)
    arguments: dict[str, JsonValue] = {}
    code: str = ""
    inputs: tuple[TensorSpec, ...] = Field(min_length=1)
    outputs: tuple[TensorSpec, ...] = Field(min_length=1)
    preprocessing: dict[str, JsonValue] | None = None
    labels: tuple[str, ...] = ()
    layers: tuple[LayerSpec, ...] = ()
    onnx_values: dict[str, str] = {}
    programs: dict[Program, str] = {}
    golden: str = GOLDEN_FILE
    parity: dict[Program, dict[int, float]] = {}
    opsets: dict[str, int] = {}
    int8: Int8 | None = None
    metrics: dict[str, JsonValue] = {}
    licence: str = ""
    data: dict[str, JsonValue] = {}
    files: dict[str, FileEntry]
    tools: dict[str, str] = {}
    _read: set[str] = PrivateAttr(default_factory=set)

    @field_validator("inputs", "outputs")
    @classmethod
    def _distinct_names(cls, specs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
        _refuse_duplicates([spec.name for spec in specs])
        return specs

    @field_validator("layers")
    @classmethod
    def _distinct_paths(cls, layers: tuple[LayerSpec, ...]) -> tuple[LayerSpec, ...]:
        _refuse_duplicates([layer.path for layer in layers])
        return layers

    @model_validator(mode="after")
    def _files_listed(self) -> Self:
        for name in self.files:
            if name in ("", ".", "..", MANIFEST_FILE) or any(mark in name for mark in "/\\\0:"):
                raise ValueError(f"files: {name!r} is not a plain file name")
        if self.code and not self.architecture.startswith(f"{self.code}:"):
            raise ValueError(f"architecture: want {self.code}:NAME for the code in {self.code}")
        for name in (WEIGHTS_FILE, self.golden, *self.programs.values(), *filter(None, [self.code])):
            if name not in self.files:
                raise ValueError(f"files: {name!r} is used but not listed")
        if ("onnx-int8" in self.programs) != (self.int8 is not None):
            raise ValueError("int8: want its figures with a program onnx-int8, and only then")
        available = {layer.path for layer in self.layers if layer.available}
        for path in sorted(self.onnx_values.keys() - available):
            raise ValueError(f"onnx_values: {path!r} is no layer that can be tapped")
        return self

    @cached_property
    def layers_by_path(self) -> dict[str, LayerSpec]:
        """The layer index by path."""
        return {layer.path: layer for layer in self.layers}

    @classmethod
    def read(cls, directory: Path | str) -> "Manifest":
        """Read and check `directory/manifest.json`; ManifestError names the file and the path of the key."""
        path = Path(directory) / MANIFEST_FILE
        try:
            content = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise ManifestError(f"{path}: no such file, so {directory} is not an artefact") from None
        except OSError as error:
            raise ManifestError(f"{path}: {error.strerror or error}") from error
        except ValueError as error:
            raise ManifestError(f"{path}: not JSON: {error}") from error
        if isinstance(content, dict) and content.get("schema_version") not in _READ_VERSIONS:
            raise ManifestError(
                f"{path}: schema_version: this release reads {' and '.join(map(str, _READ_VERSIONS))}, "
                f"got {content.get('schema_version')!r}; export the model again"
            )
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            refuse(path, error)

    def write(self, directory: Path | str) -> None:
        """Write `directory/manifest.json`."""
        text = json.dumps(self.model_dump(mode="json"), indent=1, ensure_ascii=False)
        (Path(directory) / MANIFEST_FILE).write_text(text + "\n", encoding="utf-8")

    def verify_files(self, directory: Path | str) -> None:
        """Compare size and sha256 of every listed file; ManifestError names one that differs.

        Those that `read_verified` of this object has read are verified already, and not hashed twice.
        """
        for name in self.files.keys() - self._read:
            self.read_verified(directory, name)

    def read_verified(self, directory: Path | str, name: str) -> bytes:
        """Return the bytes of a listed file after checking them, so that what is loaded is what was checked."""
        path = Path(directory) / name
        entry = self.files.get(name)
        if entry is None:
            raise ManifestError(f"{path}: not listed in {MANIFEST_FILE}")
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ManifestError(f"{path}: {error.strerror or error}, but {MANIFEST_FILE} lists it") from error
        if len(content) != entry.bytes:
            raise ManifestError(f"{path}: {entry.bytes} bytes in {MANIFEST_FILE}, {len(content)} in the file")
        digest = hashlib.sha256(content).hexdigest()
        if digest != entry.sha256:
            raise ManifestError(f"{path}: sha256 {entry.sha256} in {MANIFEST_FILE}, {digest} in the file")
        self._read.add(name)
        return content


def file_entry(path: Path) -> FileEntry:
    """Return size and digest of the file at `path`."""
    content = path.read_bytes()
    return FileEntry(sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))


def refuse(path: Path | str, error: ValidationError) -> NoReturn:
    """Raise ManifestError with the file, the key path and the first thing that pydantic found wrong there."""
    first = error.errors(include_url=False)[0]
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
    got: Any = first["input"]
    shown = "" if isinstance(got, dict | BaseModel) else f", got {got!r}"[:120]
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    raise ManifestError(f"{path}: {key or 'top level'}: {first['msg']}{shown}{more}") from error


def _refuse_duplicates(names: list[str]) -> None:
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"named twice: {', '.join(repeated)}")
