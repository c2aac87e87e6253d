"""What a server says of itself: metadata, configuration, statistics, log and trace settings, shared memory."""

import logging

import grpc
import numpy as np
import pytest
from numeric import Model, asked, identity, numeric

from layercast.proto import messages
from layercast.proto.messages import LogSettingsRequest, ModelStatisticsRequest, TraceSettingRequest
from layercast.server.settings import ModelSettings


@pytest.fixture(scope="module")
def served():
    inputs = [("x", "FP32", (-1,)), ("text", "BYTES", (1,)), ("half", "BF16", (2, 3))]
    models = {
        "same": [Model(identity), Model(identity, version=2)],
        "wide": Model(lambda i: {"y": i["x"]}, inputs, settings=ModelSettings(max_batch=7, max_delay_ms=2.5)),
    }
    with numeric(models) as server:
        yield server


def test_metadata_names_every_datatype_and_version(served):
    metadata = served.call("ModelMetadata", messages.ModelMetadataRequest(name="wide"))
    described = [(tensor.name, tensor.datatype, list(tensor.shape)) for tensor in metadata.inputs]
    assert described == [("x", "FP32", [-1, -1]), ("text", "BYTES", [-1, 1]), ("half", "BF16", [-1, 2, 3])]
    metadata = served.call("ModelMetadata", messages.ModelMetadataRequest(name="same", version="1"))
    assert list(metadata.versions) == ["1", "2"]


def test_the_configuration_fits_the_metadata(served):
    config = served.call("ModelConfig", messages.ModelConfigRequest(name="wide")).config
    assert (config.max_batch_size, config.dynamic_batching.max_queue_delay_microseconds) == (7, 2500)
    # The numbers of TYPE_FP32, TYPE_STRING and TYPE_BF16; the batch dimension is left out.
    assert [(i.name, i.data_type, list(i.dims)) for i in config.input] == [
        ("x", 11, [-1]), ("text", 13, [1]), ("half", 14, [2, 3]),
    ]  # fmt: skip
    assert config.WhichOneof("scheduling_choice") == "dynamic_batching"
    assert config.version_policy.WhichOneof("policy_choice") == "all"
    assert not config.model_transaction_policy.decoupled


def test_statistics_cover_the_versions_asked_for_exactly(served):
    def statistics(name="", version=""):
        answer = served.call("ModelStatistics", ModelStatisticsRequest(name=name, version=version))
        return {(s.name, s.version): s for s in answer.model_stats}

    before = statistics()
    assert set(before) == {("same", "1"), ("same", "2"), ("wide", "1")}
    for version, rows in (("1", 3), ("2", 2), ("2", 20), ("1", 1)):
        served.call("ModelInfer", asked("same", np.zeros((rows, 2), "f4"), model_version=version))
    with pytest.raises(grpc.RpcError):
        served.call("ModelInfer", asked("same", np.zeros(2, "f4"), model_version="1"))
    after = statistics("same")
    assert set(after) == {("same", "1"), ("same", "2")}
    assert set(statistics("same", "1")) == {("same", "1")}
    # 20 rows run as 16 and 4.
    for key, rows, requests, executions, failed in (
        (("same", "1"), 4, 2, 2, 1),
        (("same", "2"), 22, 2, 3, 0),
    ):
        one, other = before[key], after[key]
        assert other.inference_count - one.inference_count == rows
        assert other.execution_count - one.execution_count == executions
        assert other.inference_stats.success.count - one.inference_stats.success.count == requests
        assert other.inference_stats.fail.count - one.inference_stats.fail.count == failed
        assert sum(batch.batch_size * batch.compute_infer.count for batch in other.batch_stats) == other.inference_count
    with pytest.raises(grpc.RpcError) as raised:
        statistics("same", "9")
    assert raised.value.code() is grpc.StatusCode.NOT_FOUND


def test_every_end_of_a_request_has_a_series_from_the_start(served):
    codes = {
        sample.labels["code"]
        for family in served.server.metrics.registry.collect()
        for sample in family.samples
        if sample.name == "layercast_requests_total" and sample.labels["model"] == "wide"
    }
    assert {"OK", "CANCELLED", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "UNAVAILABLE", "INTERNAL"} <= codes


@pytest.fixture
def log_level():
    logger = logging.getLogger("layercast")
    before = logger.level
    yield logger
    logger.setLevel(before)


def settings(**values) -> LogSettingsRequest:
    request = LogSettingsRequest()
    for key, value in values.items():
        kind = {bool: "bool_param", int: "uint32_param", str: "string_param"}[type(value)]
        setattr(request.settings[key], kind, value)
    return request


def test_log_settings_are_told_and_set(served, log_level):
    log_level.setLevel(logging.INFO)

    def ask(**values):
        answer = served.call("LogSettings", settings(**values)).settings
        return answer["log_verbose_level"].uint32_param, answer["log_info"].bool_param, answer["log_warning"].bool_param

    assert ask() == (0, True, True)
    assert ask(log_verbose_level=1) == (1, True, True)
    assert log_level.getEffectiveLevel() == logging.DEBUG
    assert ask(log_verbose_level=0, log_info=False) == (0, False, True)
    assert log_level.getEffectiveLevel() == logging.WARNING
    assert ask(log_info=False, log_warning=False, log_error=True) == (0, False, False)
    assert log_level.getEffectiveLevel() == logging.ERROR
    answer = served.call("LogSettings", settings()).settings
    assert set(answer) == {
        "log_verbose_level", "log_info", "log_warning", "log_error", "log_file", "log_format",
    }  # fmt: skip
    assert answer["log_error"].bool_param


@pytest.mark.parametrize(
    ("values", "code", "message"),
    [
        ({"log_file": "/etc/passwd"}, "PERMISSION_DENIED", "only the operator"),
        ({"log_error": False}, "PERMISSION_DENIED", "only the operator"),
        ({"log_format": "ISO8601"}, "PERMISSION_DENIED", "only the operator"),
        ({"log_verbose_level": True}, "INVALID_ARGUMENT", "want a int, got bool"),
        ({"log_info": "yes"}, "INVALID_ARGUMENT", "want a bool, got str"),
        ({"log_infos": True}, "INVALID_ARGUMENT", "no setting 'log_infos'; nearest: log_info"),
    ],
)
def test_log_settings_that_are_not_a_clients_are_refused_and_change_nothing(served, log_level, values, code, message):
    log_level.setLevel(logging.INFO)
    with pytest.raises(grpc.RpcError, match=message) as raised:
        served.call("LogSettings", settings(**{"log_verbose_level": 3, **values}))
    assert raised.value.code().name == code
    assert log_level.getEffectiveLevel() == logging.INFO


def test_traces_are_off_and_stay_so(served):
    answer = served.call("TraceSetting", TraceSettingRequest(model_name="same")).settings
    assert list(answer["trace_level"].value) == ["OFF"]
    assert {"trace_rate", "trace_count", "log_frequency", "trace_file", "trace_mode"} < set(answer)
    request = TraceSettingRequest()
    request.settings["trace_level"].value.append("OFF")
    request.settings["trace_rate"].SetInParent()
    assert list(served.call("TraceSetting", request).settings["trace_level"].value) == ["OFF"]
    for key, value, code in (
        ("trace_level", "TIMESTAMPS", "UNIMPLEMENTED"),
        ("trace_file", "/tmp/x", "UNIMPLEMENTED"),
        ("nonsense", "1", "INVALID_ARGUMENT"),
    ):
        request = TraceSettingRequest()
        request.settings[key].value.append(value)
        with pytest.raises(grpc.RpcError) as raised:
            served.call("TraceSetting", request)
        assert raised.value.code().name == code
    with pytest.raises(grpc.RpcError) as raised:
        served.call("TraceSetting", TraceSettingRequest(model_name="nothing"))
    assert raised.value.code() is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("kind", ["System", "Cuda"])
def test_shared_memory_has_no_regions_and_takes_none(served, kind):
    def make(what, **fields):
        return getattr(messages, f"{kind}SharedMemory{what}Request")(**fields)

    assert not served.call(f"{kind}SharedMemoryStatus", make("Status")).regions
    served.call(f"{kind}SharedMemoryUnregister", make("Unregister"))
    for key in ("/", "///x", "/dev/shm/triton_internal", "mine"):
        location = {"key": key} if kind == "System" else {"raw_handle": key.encode()}
        with pytest.raises(grpc.RpcError, match="shared memory is off") as raised:
            served.call(f"{kind}SharedMemoryRegister", make("Register", name="r", byte_size=64, **location))
        assert raised.value.code() is grpc.StatusCode.PERMISSION_DENIED
        assert key not in raised.value.details() or key == "/"
    assert not served.call(f"{kind}SharedMemoryStatus", make("Status")).regions
