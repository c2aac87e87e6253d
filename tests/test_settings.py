"""Settings: their order of precedence, and what a wrong one says."""

import argparse
from pathlib import Path

import pytest

from layercast.client.main import main
from layercast.server.commands.serve import add_arguments
from layercast.server.errors import StartError
from layercast.server.settings import default_cache, read


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_defaults_are_the_documented_ports_on_loopback():
    settings = read({})
    assert (settings.host, settings.grpc_port, settings.http_port, settings.metrics_port) == (
        "127.0.0.1",
        8001,
        8000,
        8002,
    )
    assert settings.max_message_bytes == 64 * 1024 * 1024


def test_command_line_beats_environment_beats_file_beats_default(tmp_path, monkeypatch):
    assert read({}).max_batch == 128
    Path("layercast.toml").write_text("max_batch = 3\nqueue_rows = 30\n")
    assert (read({}).max_batch, read({}).queue_rows) == (3, 30)
    monkeypatch.setenv("LAYERCAST_MAX_BATCH", "4")
    assert (read({}).max_batch, read({}).queue_rows) == (4, 30)
    assert read({"max_batch": 5}).max_batch == 5


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"grpc_prt": 1}, "unknown setting 'grpc_prt'; did you mean 'grpc_port'?"),
        ({"grpc_port": 70000}, "grpc_port: .*65535.*70000"),
        ({"max_batch": 0}, "max_batch: .*1.*0"),
        ({"max_delay_ms": -1.0}, "max_delay_ms"),
        ({"engine": "tensorrt"}, "engine: .*'auto'.*tensorrt"),
    ],
)
def test_a_wrong_setting_names_the_key_and_the_value(given, message):
    with pytest.raises(StartError, match=message):
        read(given)


def test_a_wrong_key_in_the_file_names_the_nearest():
    Path("layercast.toml").write_text("max_bacth = 3\n")
    with pytest.raises(StartError, match="unknown setting 'max_bacth'; did you mean 'max_batch'"):
        read({})


def test_a_file_that_is_not_toml_is_named():
    Path("layercast.toml").write_text("max_batch 3")
    with pytest.raises(StartError, match=r"layercast\.toml: "):
        read({})


def test_a_models_own_file_overrides_the_server(tmp_path):
    settings = read({"max_batch": 16, "max_delay_ms": 2.0})
    model = tmp_path / "mnist"
    model.mkdir()
    assert settings.for_model(model).max_batch == 16
    (model / "layercast.toml").write_text('max_batch = 8\nengine = "eager"\n')
    own = settings.for_model(model)
    assert (own.max_batch, own.engine, own.max_delay_ms) == (8, "eager", 2.0)


def test_a_models_own_file_refuses_what_belongs_to_the_server(tmp_path):
    model = tmp_path / "mnist"
    model.mkdir()
    (model / "layercast.toml").write_text("grpc_port = 8\n")
    with pytest.raises(StartError, match="mnist/layercast.toml: unknown setting 'grpc_port'"):
        read({}).for_model(model)


def test_the_cache_follows_the_desktop_convention(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "layercast"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert default_cache() == Path("/home/someone/.cache/layercast")


def test_a_list_is_given_with_commas_or_as_a_list(tmp_path, monkeypatch):
    assert read({"preferred_batch": "4,8"}).preferred_batch == (4, 8)
    monkeypatch.setenv("LAYERCAST_PREFERRED_BATCH", "2, 6")
    assert read({}).preferred_batch == (2, 6)
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "layercast.toml").write_text("preferred_batch = [3]\n")
    assert read({}).for_model(tmp_path / "m").preferred_batch == (3,)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"preferred_batch": "4,x"}, "preferred_batch.1: .*integer.*'x'"),
        ({"preferred_batch": "0"}, "preferred_batch.0: .*1.*'0'"),
        ({"preferred_batch": "4,65", "max_batch": 64}, "^preferred_batch must not exceed max_batch, 64$"),
        ({"preferred_batch": "4", "batching": False}, "preferred_batch means nothing with batching = false"),
        ({"oversized": "cut"}, "oversized: .*'split'.*cut"),
        ({"priorities": 0}, "priorities"),
        ({"instances": -1}, "instances"),
        ({"queue_bytes": 0}, "queue_bytes"),
        ({"queue_timeout_ms": -1}, "queue_timeout_ms"),
    ],
)
def test_a_wrong_knob_of_the_batcher_is_named(given, message):
    with pytest.raises(StartError, match=message):
        read(given)


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("LAYERCAST_MAX_BACTH", "3", "LAYERCAST_MAX_BACTH is no setting; did you mean LAYERCAST_MAX_BATCH"),
        ("LAYERCAST_MAX_BATCH", "many", "environment variable LAYERCAST_MAX_BATCH: max_batch: .*'many'"),
        ("LAYERCAST_MODEL_CONTROL", "on", "LAYERCAST_MODEL_CONTROL: model_control: .*'explicit'.*'on'"),
    ],
)
def test_a_wrong_variable_is_named(monkeypatch, variable, value, message):
    monkeypatch.setenv(variable, value)
    with pytest.raises(StartError, match=message):
        read({})


def test_variables_of_others_stop_nothing(monkeypatch):
    """Kubernetes sets these beside a service called layercast, and one called layercast-page."""
    for name, value in {
        "LAYERCAST_SERVICE_HOST": "10.0.0.1",
        "LAYERCAST_SERVICE_PORT_GRPC": "8001",
        "LAYERCAST_PORT": "tcp://10.0.0.1:8001",
        "LAYERCAST_PORT_8001_TCP_ADDR": "10.0.0.1",
        "LAYERCAST_PAGE_SERVICE_HOST": "10.0.0.2",
        "LAYERCAST_DATA": "/data",
        "LAYERCAST_URL": "localhost:8001",
    }.items():
        monkeypatch.setenv(name, value)
    assert read({}).grpc_port == 8001


@pytest.mark.parametrize("content", [b"\xff\xfe", b"max_batch = "])
def test_a_file_that_can_not_be_read_is_named(content):
    Path("layercast.toml").write_bytes(content)
    with pytest.raises(StartError, match=r"^layercast\.toml: "):
        read({})


@pytest.mark.parametrize("content", [b"\xff\xfe", b"max_batch = ", b"max_batch = 0\n", b"versions = [1]\n"])
def test_a_models_own_file_that_is_wrong_is_named_without_its_folder(tmp_path, content):
    (tmp_path / "mnist").mkdir()
    (tmp_path / "mnist" / "layercast.toml").write_bytes(content)
    with pytest.raises(StartError, match=r"^mnist/layercast\.toml: ") as raised:
        read({}).for_model(tmp_path / "mnist")
    assert str(tmp_path) not in str(raised.value)


def test_an_unknown_option_is_told_with_the_nearest(capsys):
    assert main(["serve", "--max-bacth", "3"]) == 2
    assert "unrecognized arguments: --max-bacth 3; did you mean --max-batch?" in capsys.readouterr().err


def test_watch_may_be_given_without_a_value():
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert read(vars(parser.parse_args(["--watch"]))).watch == 1
    assert read(vars(parser.parse_args(["--watch", "0.5"]))).watch == 0.5
    assert read(vars(parser.parse_args([]))).watch == 0
