"""The engine that reads layers with hooks or with parts of the ONNX program: which it takes, and how many parts it keeps."""

import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from onnx_layers import close, hooks, inputs_of, note_parts, program
from tiny import edit_manifest

from layercast.models.manifest import Manifest
from layercast.server.engines import parts, tapped, trial
from layercast.server.engines.eager import EagerEngine
from layercast.server.engines.parts import MOST_PARTS
from layercast.server.engines.tapped import TappedEngine
from layercast.server.engines.taps import OnnxProgram
from layercast.server.work import Tap


@pytest.fixture(scope="module")
def directories(repository) -> dict[str, Path]:
    return {name: repository / name / "1" for name in ("mnist", "resnet", "transformer")}


class Timed:
    """Hooks that take a while longer, or nothing when they were asked before."""

    name = "eager"

    def __init__(self, engine: EagerEngine, seconds: float) -> None:
        self._engine = engine
        self.seconds = seconds
        self._answers: dict = {}

    def tapped(self, inputs, taps, predict):
        time.sleep(self.seconds)
        if self.seconds:
            return self._engine.tapped(inputs, taps, predict)
        key = (*taps, predict)
        if key not in self._answers:
            self._answers[key] = self._engine.tapped(inputs, taps, predict)
        return self._answers[key]


def ask(engine: TappedEngine, inputs, taps, predict=False, times=8):
    for _ in range(times):
        outputs, features = engine.tapped(inputs, taps, predict)
        engine.settle()
    return outputs, features


@pytest.mark.parametrize(("seconds", "fastest"), [(0.05, "onnx"), (0.0, "eager")])
def test_the_way_that_is_measured_faster_is_taken(directories, seconds, fastest):
    manifest = Manifest.read(directories["mnist"])
    inputs, taps = inputs_of(manifest, 8), [Tap("net.0"), Tap("net.4")]
    engine = TappedEngine(Timed(hooks(directories["mnist"]), seconds), program(directories["mnist"]))
    engine.tapped(inputs, taps, True)
    assert (engine.name, engine.parts) == ("eager", 0), "what is asked for once is not compiled"
    outputs, features = ask(engine, inputs, taps, predict=True)
    assert (engine.name, engine.parts) == (fastest, 1)
    wanted_outputs, wanted = hooks(directories["mnist"]).tapped(inputs, taps, True)
    close(features, wanted)
    close(outputs, wanted_outputs)


def test_a_slow_start_is_not_the_last_word(directories, monkeypatch):
    monkeypatch.setattr(trial, "_AGAIN", 4)
    inputs, taps = inputs_of(Manifest.read(directories["mnist"]), 8), [Tap("net.0")]
    plain = Timed(hooks(directories["mnist"]), 0.0)
    engine = TappedEngine(plain, program(directories["mnist"]))
    ask(engine, inputs, taps)
    assert engine.name == "eager"
    plain.seconds = 0.05
    ask(engine, inputs, taps, times=24)
    assert engine.name == "onnx"


def test_a_layer_without_a_value_is_read_by_hooks(directories):
    inputs = inputs_of(Manifest.read(directories["transformer"]), 2)
    engine = TappedEngine(hooks(directories["transformer"]), program(directories["transformer"]))
    _, features = ask(engine, inputs, [Tap("blocks.1"), Tap("blocks.0.attn.weights")])
    assert (engine.name, engine.parts) == ("eager", 0)
    assert features[Tap("blocks.0.attn.weights")].shape == (2, 2, 9, 9)


def test_parts_are_kept_for_a_few_sets_of_layers_in_bounded_memory(directories, monkeypatch):
    monkeypatch.setattr(parts, "_PAUSE", 0)
    whole = program(directories["mnist"])
    inputs, plain = inputs_of(whole.manifest, 1), Timed(hooks(directories["mnist"]), 0.0)
    engine = TappedEngine(plain, whole)
    for path in whole.layers:
        ask(engine, inputs, [Tap(path)], times=2)
    assert engine.parts == MOST_PARTS < len(whole.layers)
    monkeypatch.setattr(tapped, "_LEAST_BYTES", 1)
    tight = TappedEngine(plain, whole)
    for path in ("net.0", "net.1", "net.2"):  # each takes more than half of what the whole program takes
        ask(tight, inputs, [Tap(path)], times=3)
    assert tight.parts == 1
    monkeypatch.setattr(tapped, "_LEAST_BYTES", 4 * whole.bytes)
    for instances, wanted in ((1, 3), (4, 1)):
        shared = TappedEngine(plain, whole, instances)
        for path in ("net.0", "net.1", "net.2"):
            ask(shared, inputs, [Tap(path)], times=3)
        assert shared.parts == wanted, "instances share the memory"


@pytest.fixture
def compiled(monkeypatch) -> list[frozenset[str]]:
    """The sets of layers that parts were compiled for, in turn; compiling is over before the next batch."""
    monkeypatch.setattr(parts, "_PAUSE", 0)
    return note_parts(monkeypatch)


def test_callers_who_take_turns_over_more_sets_than_parts_compile_nothing_new(directories, compiled):
    whole = program(directories["mnist"])
    inputs, plain = inputs_of(whole.manifest, 1), Timed(hooks(directories["mnist"]), 0.0)
    for sets in (MOST_PARTS + 1, len(whole.layers)):
        compiled.clear()
        engine = TappedEngine(plain, whole)
        for _ in range(3000 // sets):  # several times until counts are halved
            for path in list(whole.layers)[:sets]:
                ask(engine, inputs, [Tap(path)], times=3)
        assert sets > MOST_PARTS == engine.parts == len(compiled)


def test_a_set_that_is_asked_for_more_often_takes_the_place_of_one_that_is_not(directories, compiled):
    whole = program(directories["mnist"])
    inputs, plain = inputs_of(whole.manifest, 1), Timed(hooks(directories["mnist"]), 0.0)
    engine = TappedEngine(plain, whole)
    *first, new = [[Tap(path)] for path in whole.layers][: MOST_PARTS + 1]
    for taps in first:
        ask(engine, inputs, taps, times=200)
    ask(engine, inputs, new, times=10)
    assert len(compiled) == MOST_PARTS
    ask(engine, inputs, new, times=1000)
    assert compiled[MOST_PARTS:] == [{new[0].layer}]
    assert engine.parts == MOST_PARTS


def test_compiling_leaves_time_for_the_rest(directories, monkeypatch):
    clock = [10**9]
    monkeypatch.setattr(parts, "time", SimpleNamespace(perf_counter_ns=lambda: clock[0]))
    whole = program(directories["mnist"])
    part = OnnxProgram.part

    def slow(self: OnnxProgram, layers, predict: bool):
        clock[0] += 2 * 10**9
        return part(self, layers, predict)

    monkeypatch.setattr(OnnxProgram, "part", slow)
    inputs, plain = inputs_of(whole.manifest, 1), Timed(hooks(directories["mnist"]), 0.0)
    engine = TappedEngine(plain, whole)
    ask(engine, inputs, [Tap("net.0")])
    ask(engine, inputs, [Tap("net.2")], times=20)
    assert engine.parts == 1, "ten times two seconds have not passed"
    clock[0] += 20 * 10**9
    ask(engine, inputs, [Tap("net.2")])
    assert engine.parts == 2


@pytest.mark.usefixtures("compiled")
def test_a_part_that_ends_early_tells_how_much_did_not_run(directories):
    manifest = Manifest.read(directories["resnet"])
    inputs, layers = inputs_of(manifest, 1), manifest.layers_by_path
    last = max(layer.order for layer in manifest.layers)
    engine = TappedEngine(Timed(hooks(directories["resnet"]), 0.05), program(directories["resnet"]))
    skipped: list[float] = []
    engine.on_stopped = skipped.append
    taps = [Tap("layer1", "mean"), Tap("layer1.0")]
    for predict in (False, True):
        ask(engine, inputs, taps, predict, times=9)
        assert engine.name == "onnx"
        assert set(skipped) == {1 - (layers["layer1"].order + 1) / (last + 1)}
        assert len(skipped) < 9, "those that went both ways were answered by the hooks"


def lying(directory: Path, tmp_path: Path, **values: str) -> Path:
    """Copy an artefact and let its manifest name other values."""
    copied = shutil.copytree(directory, tmp_path / directory.parent.name / "1")
    edit_manifest(copied, lambda manifest: manifest["onnx_values"].update(values))
    return copied


@pytest.mark.parametrize("fault", ["another layer's value", "a value of another shape", "no such value", "a new file"])
def test_a_part_that_is_not_the_module_is_not_used(directories, tmp_path, caplog, fault):
    values = Manifest.read(directories["resnet"]).onnx_values
    wrong = {"another layer's value": values["layer1.0"], "a value of another shape": values["layer2"]}
    directory = lying(directories["resnet"], tmp_path, layer1=wrong.get(fault, "nowhere"))
    engine = TappedEngine(hooks(directory), program(directory))
    if fault == "a new file":
        (directory / "model.onnx").write_bytes(b"new")
    inputs = inputs_of(Manifest.read(directory), 3)
    _, features = ask(engine, inputs, [Tap("layer1", "mean")])
    assert (engine.name, engine.parts) == ("eager", 0)
    close(features, hooks(directories["resnet"]).tapped(inputs, [Tap("layer1", "mean")], predict=False)[1])
    (record,) = [record for record in caplog.records if record.name == parts.__name__]
    assert record.message.startswith("resnet: layers are read by eager: ")
