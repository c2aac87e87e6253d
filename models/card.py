"""The card of a trained model: what training writes beside the weights and export reads."""

import json
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from layercast.models.manifest import ManifestError, TensorSpec, refuse

CARD_FILE: Final = "card.json"


class Card(BaseModel):
    """What a model is, apart from its weights. Keys that only people read, such as `training`, are not looked at."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    description: str = ""
    architecture: str = Field(min_length=1)
    arguments: dict[str, JsonValue] = {}
    labels: tuple[str, ...] = ()
    preprocessing: dict[str, JsonValue] | None = None
    inputs: tuple[TensorSpec, ...] = Field(min_length=1)
    outputs: tuple[TensorSpec, ...] = Field(min_length=1)
    data: dict[str, JsonValue] = {}
    licence: str = ""
    metrics: dict[str, JsonValue] = {}

    @classmethod
    def read(cls, directory: Path | str) -> "Card":
        """Read and check `directory/card.json`; ManifestError names the file and the path of the key."""
        path = Path(directory) / CARD_FILE
        try:
            content = json.loads(path.read_bytes())
        except OSError as error:
            raise ManifestError(f"{path}: {error.strerror or error}") from error
        except ValueError as error:
            raise ManifestError(f"{path}: not JSON: {error}") from error
        return cls.check(content, path)

    @classmethod
    def check(cls, content: Any, path: Path | str = CARD_FILE) -> "Card":
        """Check the `content` of a card that was read from `path`."""
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            refuse(path, error)
