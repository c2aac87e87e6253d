"""Settings of the server and of one model: command line > environment `LAYERCAST_*` > `layercast.toml` > default."""

import difflib
import os
import tomllib
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

from layercast.server.errors import StartError

EngineName = Literal["auto", "eager", "torchscript", "onnx", "exported"]
DeviceName = Literal["auto", "cpu", "cuda"]

_MODEL_FILE = "layercast.toml"


def default_cache() -> Path:
    """Return `$XDG_CACHE_HOME/layercast`, or `~/.cache/layercast`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "layercast"


class ModelSettings(BaseModel):
    """Knobs of one model: the server's values, overridden by `<repository>/<model>/layercast.toml`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_batch: int = Field(default=64, ge=1, le=65_536, description="rows that run together at most")
    max_delay_ms: float = Field(default=1.0, ge=0, le=10_000, description="how long the first row waits for others, ms")
    queue_rows: int = Field(default=16_384, ge=1, le=10_000_000, description="rows that may wait; more are refused")
    engine: EngineName = Field(
        default="auto", description="what runs plain predictions; auto takes the fastest measured"
    )
    device: DeviceName = Field(default="auto", description="where models run; auto takes a GPU if there is one")


class Settings(ModelSettings, BaseSettings):
    """Everything `layercast serve` can be told. Unknown keys are errors."""

    model_config = SettingsConfigDict(env_prefix="LAYERCAST_", extra="forbid", frozen=True)

    repository: Path | None = Field(default=None, description="folder of models; without it the zoo is served")
    cache: Path = Field(
        default_factory=default_cache, description="where the zoo's exported programs are kept between starts"
    )
    host: str = Field(default="127.0.0.1", description="address to listen on; 0.0.0.0 for every interface")
    grpc_port: int = Field(default=8001, ge=0, le=65_535, description="gRPC port; 0 takes a free one")
    http_port: int = Field(default=8000, ge=0, le=65_535, description="HTTP port: REST v2, metrics; 0 takes a free one")
    metrics_port: int = Field(default=8002, ge=0, le=65_535, description="Prometheus port; 0 takes a free one")
    max_message_mb: int = Field(default=64, ge=1, le=2047, description="largest message either way, MiB")
    drain_seconds: float = Field(default=10.0, ge=0, description="how long running requests may finish at shutdown, s")
    tls_certificate: Path | None = Field(
        default=None, description="PEM file with the server's certificate chain; encrypts the gRPC and HTTP ports"
    )
    tls_key: Path | None = Field(default=None, description="PEM file with the key of that certificate")
    tls_client_ca: Path | None = Field(
        default=None, description="PEM file with the authority whose certificates clients must have (mutual TLS)"
    )
    token_file: Path | None = Field(default=None, description="TOML file with the tokens that callers must send")
    reflection: bool = Field(default=True, description="let clients list the services (gRPC reflection)")
    log_format: Literal["text", "json"] = Field(default="text", description="how log lines look")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Order the sources: what the command line gave, the environment, the file."""
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, Path(_MODEL_FILE))

    @property
    def max_message_bytes(self) -> int:
        """The largest message, in bytes."""
        return self.max_message_mb << 20

    def for_model(self, directory: Path) -> ModelSettings:
        """Return the settings of the model in `directory` (`<repository>/<model>`)."""
        values: dict[str, Any] = {name: getattr(self, name) for name in ModelSettings.model_fields}
        path = directory / _MODEL_FILE
        if path.is_file():
            try:
                values |= tomllib.loads(path.read_text())
            except (OSError, tomllib.TOMLDecodeError) as error:
                raise StartError(f"{directory.name}/{_MODEL_FILE}: {error}") from error
        try:
            return ModelSettings(**values)
        except ValidationError as error:
            raise StartError(f"{directory.name}/{_MODEL_FILE}: {explain(error, ModelSettings)}") from error


def read(given: dict[str, Any]) -> Settings:
    """Return the settings with `given` (from the command line) on top; StartError names the key and the nearest one."""
    try:
        return Settings(**given)
    except ValidationError as error:
        raise StartError(explain(error, Settings)) from error
    except tomllib.TOMLDecodeError as error:
        raise StartError(f"{_MODEL_FILE}: {error}") from error


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """Return one line a wrong setting: its path, what was wrong, and for an unknown key the nearest known one."""
    lines = []
    for fault in error.errors():
        key = ".".join(str(part) for part in fault["loc"])
        if fault["type"] == "extra_forbidden":
            near = difflib.get_close_matches(key, model.model_fields, n=1)
            lines.append(f"unknown setting {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        else:
            lines.append(f"{key}: {fault['msg']}, got {fault['input']!r}")
    return "; ".join(lines)
