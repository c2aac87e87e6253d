"""Triton's RPCs about the server itself: its log, its traces, and shared memory, which there is none of."""

import logging
from collections.abc import Mapping
from typing import Final

from layercast.proto.codec import quoted
from layercast.proto.messages import (
    CudaSharedMemoryRegisterRequest,
    CudaSharedMemoryRegisterResponse,
    CudaSharedMemoryStatusRequest,
    CudaSharedMemoryStatusResponse,
    CudaSharedMemoryUnregisterRequest,
    CudaSharedMemoryUnregisterResponse,
    LogSettingsRequest,
    LogSettingsResponse,
    SystemSharedMemoryRegisterRequest,
    SystemSharedMemoryRegisterResponse,
    SystemSharedMemoryStatusRequest,
    SystemSharedMemoryStatusResponse,
    SystemSharedMemoryUnregisterRequest,
    SystemSharedMemoryUnregisterResponse,
    TraceSettingRequest,
    TraceSettingResponse,
)
from layercast.server.errors import InvalidArgument, PermissionDenied, Unimplemented
from layercast.server.layers import near
from layercast.server.repository import Repository
from layercast.server.service.call import Call

_TRACE: Final[Mapping[str, tuple[str, ...]]] = {
    "trace_file": ("",),
    "trace_level": ("OFF",),
    "trace_rate": ("1000",),
    "trace_count": ("-1",),
    "log_frequency": ("0",),
    "trace_mode": ("triton",),
}
"""What a Triton server answers that traces nothing."""

_logger = logging.getLogger("layercast")
_FIXED: Final[dict[str, bool | int | str]] = {"log_error": True, "log_file": "", "log_format": "default"}


class AdministrationService:
    """Answers TraceSetting and LogSettings."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository

    async def trace_setting(self, request: TraceSettingRequest, call: Call) -> TraceSettingResponse:
        """The settings of a server that traces nothing; asking for anything else is refused.

        A setting without values is one to be cleared, which it already is.
        """
        if request.model_name:
            self._repository.find(request.model_name, "")
        for key, setting in request.settings.items():
            _known(key, _TRACE)
            if setting.value and tuple(setting.value) != _TRACE[key]:
                raise Unimplemented(
                    f"this server writes no traces: {key} is {', '.join(_TRACE[key]) or 'empty'} and stays so",
                    field=f"settings[{key}]",
                )
        return TraceSettingResponse(
            settings={key: TraceSettingResponse.SettingValue(value=values) for key, values in _TRACE.items()}
        )

    async def log_settings(self, request: LogSettingsRequest, call: Call) -> LogSettingsResponse:
        """How much is logged. `log_info`, `log_warning` and `log_verbose_level` (0 or more) can be set.

        Errors are always logged, to where the operator said, in the format that the operator chose.
        """
        changed = _levels() | {key: _checked(key, value) for key, value in request.settings.items()}
        if request.settings:
            level = _level(changed)
            # At the operator's own level there is nothing of ours to keep.
            _logger.setLevel(logging.NOTSET if level == logging.getLogger().getEffectiveLevel() else level)
        return LogSettingsResponse(settings={key: _setting(value) for key, value in (_levels() | _FIXED).items()})


def _levels() -> dict[str, bool | int | str]:
    level = _logger.getEffectiveLevel()
    return {
        "log_info": level <= logging.INFO,
        "log_warning": level <= logging.WARNING,
        "log_verbose_level": int(level <= logging.DEBUG),
    }


def _level(settings: Mapping[str, bool | int | str]) -> int:
    if settings["log_verbose_level"]:
        return logging.DEBUG
    if settings["log_info"]:
        return logging.INFO
    return logging.WARNING if settings["log_warning"] else logging.ERROR


def _checked(key: str, value: LogSettingsRequest.SettingValue) -> bool | int | str:
    field = f"settings[{key}]"
    _known(key, _levels() | _FIXED)
    kind = value.WhichOneof("parameter_choice")
    given: bool | int | str = getattr(value, kind) if kind else ""
    wanted = type((_levels() | _FIXED)[key])
    if kind is None or type(given) is not wanted:
        got = type(given).__name__ if kind else "nothing"
        raise InvalidArgument(f"log setting {key}: want a {wanted.__name__}, got {got}", field=field)
    if key in _FIXED and given != _FIXED[key]:
        raise PermissionDenied(
            f"log setting {key}: only the operator sets it, on the command line; it is {_FIXED[key]!r}", field=field
        )
    return given


def _setting(value: bool | int | str) -> LogSettingsResponse.SettingValue:
    if isinstance(value, bool):
        return LogSettingsResponse.SettingValue(bool_param=value)
    if isinstance(value, int):
        return LogSettingsResponse.SettingValue(uint32_param=value)
    return LogSettingsResponse.SettingValue(string_param=value)


def _known(key: str, known: Mapping[str, object]) -> None:
    if key not in known:
        raise InvalidArgument(f"there is no setting {quoted(key)}; {near(key, list(known))}", field=f"settings[{key}]")


class SharedMemoryService:
    """Answers the RPCs of shared memory: there are no regions, and nobody may register one.

    A region that a client names and the server writes to is how Triton was taken over (CVE-2025-23319 and its
    followers); the bytes travel in the message here.
    """

    async def system_shared_memory_status(
        self, request: SystemSharedMemoryStatusRequest, call: Call
    ) -> SystemSharedMemoryStatusResponse:
        """No regions."""
        return SystemSharedMemoryStatusResponse()

    async def system_shared_memory_register(
        self, request: SystemSharedMemoryRegisterRequest, call: Call
    ) -> SystemSharedMemoryRegisterResponse:
        """Refused."""
        raise _refused("key")

    async def system_shared_memory_unregister(
        self, request: SystemSharedMemoryUnregisterRequest, call: Call
    ) -> SystemSharedMemoryUnregisterResponse:
        """Nothing is registered afterwards, as before; load generators ask for it first."""
        return SystemSharedMemoryUnregisterResponse()

    async def cuda_shared_memory_status(
        self, request: CudaSharedMemoryStatusRequest, call: Call
    ) -> CudaSharedMemoryStatusResponse:
        """No regions."""
        return CudaSharedMemoryStatusResponse()

    async def cuda_shared_memory_register(
        self, request: CudaSharedMemoryRegisterRequest, call: Call
    ) -> CudaSharedMemoryRegisterResponse:
        """Refused."""
        raise _refused("raw_handle")

    async def cuda_shared_memory_unregister(
        self, request: CudaSharedMemoryUnregisterRequest, call: Call
    ) -> CudaSharedMemoryUnregisterResponse:
        """Nothing is registered afterwards, as before."""
        return CudaSharedMemoryUnregisterResponse()


def _refused(field: str) -> PermissionDenied:
    return PermissionDenied("shared memory is off: send tensors in the message (raw_input_contents)", field=field)
