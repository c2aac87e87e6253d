"""What layers and explanations cost, as the metrics of a running server tell it."""

import urllib.request
from pathlib import Path

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from serving import Running, running
from test_feature_settings import refused
from test_feature_stream import asked, stream
from test_server_explain import message
from test_server_features import extract
from test_server_inference import request, rows_for

from layercast.server.work import Tap


@pytest.fixture(scope="module")
def counted(repository: Path, tmp_path_factory: pytest.TempPathFactory):
    root = tmp_path_factory.mktemp("counted")
    for name in ("resnet", "shared"):
        (root / name).mkdir()
        (root / name / "1").mkdir()
        for file in (repository / name / "1").iterdir():
            (root / name / "1" / file.name).hardlink_to(file)
    with running(root, engine="eager", max_batch=16) as server:
        yield server


def scraped(server: Running, model: str) -> dict[tuple[str, ...], float]:
    """Every sample of the model, by name and by the labels that are not the model's own."""
    with urllib.request.urlopen(server.metrics, timeout=10) as response:
        families = text_string_to_metric_families(response.read().decode())
    return {
        (sample.name, *(value for key, value in sorted(sample.labels.items()) if key not in ("model", "version"))):
        sample.value
        for family in families
        for sample in family.samples
        if sample.labels.get("model") == model
    }  # fmt: skip


def grown(server: Running, model: str, act) -> dict[tuple[str, ...], float]:
    before = scraped(server, model)
    act()
    after = scraped(server, model)
    return {key: value - before.get(key, 0) for key, value in after.items() if value != before.get(key, 0)}


def test_bytes_and_taps_are_those_of_the_answers(counted):
    x = rows_for("resnet", 3)
    size = 3 * 64 * 32 * 32 * 4 + 3 * 64 * 2
    for ask in (
        lambda: extract(counted, "resnet", x, ["layer1", "layer1@mean@fp16"], ["logits"]),
        lambda: list(stream(counted, asked("resnet", x, ["layer1", "layer1@mean@fp16"], ["logits"]))),
        lambda: counted.call("ModelInfer", request("resnet", x, ["layer:layer1", "layer:layer1@mean@fp16", "logits"])),
    ):
        found = grown(counted, "resnet", ask)
        assert found["layercast_feature_bytes_total",] == size
        assert found["layercast_feature_taps_total",] == 2
        assert ("layercast_early_exit_skipped_ratio_count",) not in found  # a prediction was wanted too


def test_early_exits_tell_how_much_did_not_run(counted):
    x = rows_for("resnet", 1)
    layers = counted.server.repository.find("resnet", "").manifest.layers_by_path
    last = max(layer.order for layer in layers.values())
    for name in ("layer1", "stem"):
        found = grown(counted, "resnet", lambda name=name: extract(counted, "resnet", x, [name]))
        assert found["layercast_early_exit_skipped_ratio_count",] == 1
        share = 1 - (layers[name].order + 1) / (last + 1)
        assert found["layercast_early_exit_skipped_ratio_sum",] == pytest.approx(share)
    found = grown(counted, "resnet", lambda: counted.call("ModelInfer", request("resnet", x)))
    assert not any(key[0].startswith(("layercast_early", "layercast_feature")) for key in found)


def test_hooks_are_counted_while_they_are_there_and_none_stays(counted):
    engine = counted.server.repository.find("shared", "").loaded.runner.eager
    x = {"x": rows_for("shared", 1)}
    seen = []
    handle = engine._module.relu.register_forward_hook(
        lambda *_: seen.append(scraped(counted, "shared")["layercast_hooks",])
    )
    engine.tapped(x, [Tap("shared#0"), Tap("relu")], predict=True)
    assert seen == [4]  # this test's own, one on each of two modules, one on the model
    handle.remove()
    assert scraped(counted, "shared")["layercast_hooks",] == 0


def test_explanations_are_counted_by_method(counted):
    x = rows_for("resnet", 2)
    asks = message("resnet", x, "integrated-gradients", steps=6)
    found = grown(counted, "resnet", lambda: counted.call("Explain", asks))
    # Six steps, and both ends for the error, of each of two rows.
    assert found["layercast_explain_evaluations_total", "integrated-gradients"] == 2 * (6 + 2)
    assert found["layercast_explain_steps_sum", "integrated-gradients"] == 6 + 2
    assert found["layercast_explain_steps_count", "integrated-gradients"] == 1
    assert found["layercast_explain_duration_seconds_count", "integrated-gradients"] == 1
    assert found["layercast_explain_duration_seconds_sum", "integrated-gradients"] > 0
    assert found["layercast_requests_total", "OK", "explain"] == 1
    wrong = message("resnet", x, "no-such-method")
    found = grown(counted, "resnet", lambda: refused(counted.call, "Explain", wrong))
    assert found["layercast_requests_total", "INVALID_ARGUMENT", "explain"] == 1
    assert not any(key[0].startswith("layercast_explain") for key in found)
    assert np.isfinite(list(scraped(counted, "resnet").values())).all()
