"""Settings of the server and of one model: command line > environment `LAYERCAST_*` > `layercast.toml` > default."""

import difflib
import os
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from layercast.models.foreign.trust import Trust
from layercast.server.compiled import default_folder
from layercast.server.errors import StartError

EngineName = Literal["auto", "eager", "torchscript", "onnx", "exported", "onnx-int8", "winograd", "encoder"]
Precision = Literal["fp32", "bf16"]

MODEL_FILE = "layercast.toml"
MOST_INSTANCES: Final = 64
_PREFIX = "LAYERCAST_"
# Read by other parts: the client, set-up scripts, tests.
_OTHERS = re.compile(r"LAYERCAST_(URL|TOKEN|TRACEBACK|DATA|YES|TEST_\w+)\Z")
# What Kubernetes sets for a service called layercast, or layercast-and-more, in every pod beside it.
_OF_KUBERNETES = re.compile(r"LAYERCAST_(\w+_)?(SERVICE_(HOST|PORT)|PORT_\d+_)")


def default_cache() -> Path:
    """Return `$XDG_CACHE_HOME/layercast`, or `~/.cache/layercast`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "layercast"


def _parts(value: object) -> object:
    """Return the parts of texts with commas, as the command line (repeatedly) and the environment give a list."""
    given = [value] if isinstance(value, str) else value
    if not isinstance(given, list | tuple):
        return given
    parts: list[object] = []
    for each in given:
        parts += [part.strip() for part in each.split(",") if part.strip()] if isinstance(each, str) else [each]
    return parts


Sizes = Annotated[tuple[Annotated[int, Field(ge=1, le=65_536)], ...], BeforeValidator(_parts), NoDecode]
Names = Annotated[tuple[str, ...], BeforeValidator(_parts), NoDecode]


def _word(value: object) -> object:
    """Return a boolean, as TOML writes it without quotes, as the word that the command line gives."""
    return str(value).lower() if isinstance(value, bool) else value


Switch = Annotated[Literal["true", "pooled", "false"], BeforeValidator(_word)]


class ModelSettings(BaseModel):
    """Knobs of one model: the server's values, overridden by `<repository>/<model>/layercast.toml`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_batch: int = Field(default=128, ge=1, le=65_536, description="rows that run together at most")
    max_delay_ms: float = Field(default=0.0, ge=0, le=10_000, description="how long the first row waits for others, ms")
    preferred_batch: Sizes = Field(default=(), description="batch sizes that leave as soon as they are reached: 4,8")
    batching: bool = Field(default=True, description="let requests share a forward; without, each runs alone")
    oversized: Literal["split", "refuse"] = Field(
        default="split", description="what becomes of a request with more rows than max_batch"
    )
    queue_rows: int = Field(default=16_384, ge=1, le=10_000_000, description="rows that may wait; more are refused")
    queue_bytes: int = Field(
        default=1 << 28, ge=1, le=1 << 40, description="bytes of input that may wait; more are refused"
    )
    queue_timeout_ms: float = Field(
        default=0.0, ge=0, le=86_400_000, description="how long a request may wait to run, ms; 0 for any time"
    )
    priorities: int = Field(
        default=1, ge=1, le=100, description="levels of the request parameter `priority`, 1 the highest, the last usual"
    )
    instances: int = Field(
        default=0,
        ge=0,
        le=MOST_INSTANCES,
        description="batches that run at the same time, each with its part of the processors; "
        "0 takes one, or one a processor, whichever is measured to answer more",
    )
    engine: EngineName = Field(
        default="auto",
        description="what runs plain predictions; auto takes the fastest measured for each size of batch",
    )
    allow_int8: bool = Field(
        default=False, description="let auto take onnx-int8 too, which is faster for some models and less accurate"
    )
    device: str = Field(
        default="auto",
        pattern=r"^(auto|cpu|cuda(:(0|[1-9]\d{0,2}))?)$",
        description="where models run: cpu, cuda (instances in turn on all GPUs) or cuda:1; auto takes a GPU if any",
    )
    precision: Precision = Field(
        default="fp32", description="bf16 computes products and convolutions in BF16, on engine eager alone"
    )
    steering: bool = Field(default=False, description="let callers change layers for their own rows (Steer)")
    versions: Literal["all", "latest"] = Field(
        default="all", description="which versions are served; latest is the highest that loads"
    )
    features: Switch = Field(
        default="true",
        description="whether callers get layers: true, pooled (one vector a row, no map of places or tokens), false",
    )
    feature_layers: Names = Field(
        default=("*",), description="patterns of the layers that callers may ask for; repeat it for several"
    )
    max_taps: int = Field(default=1024, ge=1, le=65_536, description="layers that one request may ask for")
    max_feature_bytes: int = Field(
        default=4 << 30, ge=1, le=1 << 40, description="bytes of layers' values that one request may ask for"
    )
    max_explain_evaluations: int = Field(
        default=65_536, ge=1, le=1 << 30, description="rows that one explanation may run, its steps or samples counted"
    )

    @model_validator(mode="after")
    def _bf16_fits(self) -> Self:
        if self.precision == "bf16" and self.engine not in ("auto", "eager"):
            raise ValueError(f"precision bf16 is for engine eager, not {self.engine}; leave one of them out")
        return self

    @model_validator(mode="after")
    def _preferred_fits(self) -> Self:
        if self.preferred_batch and not self.batching:
            raise ValueError("preferred_batch means nothing with batching = false; leave one of them out")
        if max(self.preferred_batch, default=0) > self.max_batch:
            raise ValueError(f"preferred_batch must not exceed max_batch, {self.max_batch}")
        return self


class Settings(ModelSettings, BaseSettings):
    """Everything `layercast serve` can be told. Unknown keys are errors."""

    model_config = SettingsConfigDict(env_prefix=_PREFIX, extra="forbid", frozen=True)

    repository: Path | None = Field(default=None, description="folder of models; without it the zoo is served")
    cache: Path = Field(
        default_factory=default_cache, description="where the zoo's exported programs are kept between starts"
    )
    compiled: Path = Field(
        default_factory=default_folder, description="folder of `layercast compile`, whose code is used if it is current"
    )
    model_control: Literal["none", "explicit"] = Field(
        default="none", description="explicit lets callers load and unload models (RepositoryModelLoad, …Unload)"
    )
    watch: float = Field(
        default=0.0, ge=0, le=86_400, description="look for added, changed and removed models every so many seconds; "
        "0 never, without a value 1",
        json_schema_extra={"bare": "1"},
    )  # fmt: skip
    host: str = Field(default="127.0.0.1", min_length=1, description="address to listen on; 0.0.0.0 for all interfaces")
    grpc_port: int = Field(default=8001, ge=0, le=65_535, description="gRPC port; 0 takes a free one")
    http_port: int = Field(default=8000, ge=0, le=65_535, description="HTTP port: REST v2, metrics; 0 takes a free one")
    metrics_port: int = Field(default=8002, ge=0, le=65_535, description="Prometheus port; 0 takes a free one")
    front_end: Literal["direct", "grpcio", "envoy"] = Field(
        default="direct", description="what speaks to the network; envoy needs layercast[envoy]"
    )
    max_message_mb: int = Field(default=64, ge=1, le=2047, description="largest message either way, MiB")
    drain_seconds: float = Field(default=10.0, ge=0, description="how long running requests may finish at shutdown, s")
    drain_delay_seconds: float = Field(
        default=0.0, ge=0, le=3600, description="how long to answer on while saying 'not ready', before the drain, s"
    )
    tls_certificate: Path | None = Field(
        default=None, description="PEM file with the server's certificate chain; encrypts the gRPC and HTTP ports"
    )
    tls_key: Path | None = Field(default=None, description="PEM file with the key of that certificate")
    tls_client_ca: Path | None = Field(
        default=None, description="PEM file with the authority whose certificates clients must have (mutual TLS)"
    )
    token_file: Path | None = Field(default=None, description="TOML file with the tokens that callers must send")
    reflection: bool = Field(default=True, description="let clients list the services (gRPC reflection)")
    trust: Names = Field(
        default=(),
        description="package, package:factory or artefact-code (files kept in artefacts) whose Python code may run, "
        "which layers of models that are not layercast's need; repeat it for several",
    )
    log_format: Literal["text", "json"] = Field(default="text", description="how log lines look")

    @field_validator("trust")
    @classmethod
    def _known_kinds(cls, entries: tuple[str, ...]) -> tuple[str, ...]:
        Trust.of(entries)
        return entries

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
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, Path(MODEL_FILE))

    @property
    def max_message_bytes(self) -> int:
        """The largest message, in bytes."""
        return self.max_message_mb << 20

    @property
    def hands_over_together(self) -> bool:
        """Whether the front end gives the batcher in one go all that came while the event loop was busy."""
        return self.front_end != "grpcio"

    def for_model(self, directory: Path) -> ModelSettings:
        """Return the settings of the model in `directory` (`<repository>/<model>`)."""
        values: dict[str, Any] = {name: getattr(self, name) for name in ModelSettings.model_fields}
        path = directory / MODEL_FILE
        if path.is_file():
            try:
                values |= tomllib.loads(path.read_text(encoding="utf-8"))
            except OSError as error:
                raise StartError(f"{directory.name}/{MODEL_FILE}: {error.strerror}") from error
            except ValueError as error:  # not TOML, or not UTF-8
                raise StartError(f"{directory.name}/{MODEL_FILE}: {error}") from error
        try:
            return ModelSettings(**values)
        except ValidationError as error:
            raise StartError(f"{directory.name}/{MODEL_FILE}: {explain(error, ModelSettings)}") from error


def read(given: dict[str, Any]) -> Settings:
    """Return the settings with `given` (from the command line) on top; StartError names the key and the nearest one."""
    _check_environment()
    try:
        return Settings(**given)
    except ValidationError as error:
        raise StartError(explain(error, Settings, lambda key: _source(key, given))) from error
    except OSError as error:
        raise StartError(f"{MODEL_FILE}: {error.strerror}") from error
    except ValueError as error:  # not TOML, or not UTF-8
        raise StartError(f"{MODEL_FILE}: {error}") from error


def _check_environment() -> None:
    """Refuse a variable that looks like a setting and is none: it would be ignored in silence."""
    for variable, value in os.environ.items():
        name = variable.removeprefix(_PREFIX).lower()
        if not variable.startswith(_PREFIX) or name in Settings.model_fields or _OTHERS.match(variable):
            continue
        if not _OF_KUBERNETES.match(variable) and not value.startswith(("tcp://", "udp://")):
            near = difflib.get_close_matches(name, Settings.model_fields, n=1)
            hint = f"; did you mean {_PREFIX}{near[0].upper()}?" if near else ""
            raise StartError(f"environment variable {variable} is no setting{hint}")


def _source(key: str, given: dict[str, Any]) -> str:
    """Return where the setting `key` was read, as the beginning of a message; "" for the command line."""
    if key in given:
        return ""
    variable = _PREFIX + key.upper()
    return f"environment variable {variable}: " if variable in os.environ else f"{MODEL_FILE}: "


def explain(error: ValidationError, model: type[BaseModel], source: Callable[[str], str] = lambda key: "") -> str:
    """Return one line a wrong setting: its path, what was wrong, and for an unknown key the nearest known one.

    `source` gives, for a setting, the beginning of the line that says where it was read.
    """
    lines = []
    for fault in error.errors():
        key = ".".join(str(part) for part in fault["loc"])
        where = source(str(fault["loc"][0])) if fault["loc"] else ""
        if fault["type"] == "extra_forbidden":
            near = difflib.get_close_matches(key, model.model_fields, n=1)
            lines.append(f"{where}unknown setting {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        else:
            # A fault of several keys together has no place of its own, and all the settings for an input.
            text = f"{key}: {fault['msg']}, got {fault['input']!r}" if key else str(fault["ctx"]["error"])
            lines.append(where + text)
    return "; ".join(lines)
