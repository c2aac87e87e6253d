"""Layers read from the ONNX program: which values carry them, that they are the module's, and when they are used."""

import json
import shutil
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from conftest import card_of, in_one_thread
from onnx import TensorProto, helper
from serving import running
from test_server_features import arrays, extract
from test_server_inference import rows_for
from torch import nn

from layercast.models import registry
from layercast.models.artefact import load_module
from layercast.models.examples import Examples
from layercast.models.export.writer import export_artefact
from layercast.models.hooks import FeatureExtractor
from layercast.models.manifest import Manifest
from layercast.models.onnx_cut import CutError, cut, values_of
from layercast.models.onnx_runtime import onnxruntime
from layercast.server.engines import parts, tapped, trial
from layercast.server.engines.eager import EagerEngine
from layercast.server.engines.parts import MOST_PARTS
from layercast.server.engines.tapped import TappedEngine
from layercast.server.engines.taps import OnnxProgram
from layercast.server.errors import InvalidArgument
from layercast.server.loader import load
from layercast.server.settings import ModelSettings
from layercast.server.work import Tap

CPU = torch.device("cpu")
# What fusion leaves no value of: what a batch norm is folded into, and the inside of attention.
FUSED = {
    "mnist": {"net.0.0", "net.2.0"},
    "resnet": {"stem", "layer2.0.shortcut.0"} | {
        f"layer{stage}.{block}.conv{number}" for stage in (1, 2) for block in (0, 1) for number in (1, 2)
    },
    # Besides, the dropout after a projection whose bias is zero, as untrained ones are: both values before it are equal.
    "transformer": {"blocks.0.attn_dropout", "blocks.1.attn_dropout"} | {
        f"blocks.{block}.attn.{part}" for block in (0, 1) for part in ("query", "key", "value", "weights", "dropout")
    },
    "shared": set(),
}  # fmt: skip
VARIANTS = {
    "mlp": ("mnist", "MLP", {"input_size": 12, "hidden_sizes": [8, 6], "output_size": 3, "activation_name": "gelu"}),
    "simple": ("mnist", "SimpleNet", {"input_size": 12, "hidden_size": 6}),
    "squeezed": ("resnet", "ResNetLike", {"squeeze_excitation": True}),
    "causal": ("transformer", "TransformerEncoder", card_of("transformer")["arguments"] | {"causal": True}),
    "after": ("transformer", "TransformerEncoder", card_of("transformer")["arguments"] | {"norm_first": False}),
}


def varied(name: str, root: Path) -> Path:
    """Export another variant of an architecture than the shared repository holds."""
    like, architecture, arguments = VARIANTS[name]
    card = card_of(like) | {"name": name, "architecture": architecture, "arguments": arguments}
    torch.manual_seed(3)
    module = registry.build(architecture, **arguments)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
            part.running_mean.uniform_(-0.2, 0.2)
            part.running_var.uniform_(0.5, 1.5)
    if like == "resnet":
        card |= {"inputs": [{**card["inputs"][0], "shape": [-1, 3, 8, 8]}], "preprocessing": None}
    if like == "mnist":
        size = arguments.get("output_size", 10)
        card |= {"inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 12]}], "preprocessing": None}
        card |= {"outputs": [{"name": "logits", "datatype": "FP32", "shape": [-1, size]}], "labels": []}
    return write(module.eval(), card, root)


def write(module: nn.Module, card: dict, root: Path) -> Path:
    with in_one_thread():
        export_artefact(module, card, root / card["name"] / "1", programs=("onnx",))
    return root / card["name"] / "1"


@pytest.fixture(scope="module")
def directories(repository, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("variants")
    return {name: repository / name / "1" for name in FUSED} | {name: varied(name, root) for name in VARIANTS}


def program(directory: Path) -> OnnxProgram:
    return OnnxProgram(directory, Manifest.read(directory), 1)


def hooks(directory: Path) -> EagerEngine:
    manifest = Manifest.read(directory)
    return EagerEngine(load_module(directory, manifest), manifest, CPU)


def inputs_of(manifest: Manifest, batch: int, length: int = 9) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in Examples(manifest.inputs, seed=5).make(batch, length).items()}


def close(got: dict, wanted: dict) -> None:
    assert got.keys() == wanted.keys()
    for key, value in got.items():
        assert value.dtype == wanted[key].dtype
        loose = 1e-3 if value.dtype == np.float16 else 1e-4
        np.testing.assert_allclose(value, wanted[key], atol=loose, rtol=loose, err_msg=str(key))


@pytest.mark.parametrize("name", FUSED)
def test_every_layer_has_a_value_but_those_that_fusion_took(directories, name):
    manifest = Manifest.read(directories[name])
    assert {layer.path for layer in manifest.layers if layer.available} - manifest.onnx_values.keys() == FUSED[name]


@pytest.mark.parametrize("name", [*FUSED, *VARIANTS])
def test_every_value_is_what_a_hook_on_the_module_sees(directories, name):
    manifest, whole = Manifest.read(directories[name]), program(directories[name])
    module = load_module(directories[name], manifest)
    together = whole.part(whole.layers, predict=True)
    alone = {path: whole.part([path], predict=False) for path in whole.layers}
    assert len(whole.layers) > len([layer for layer in manifest.layers if layer.available]) / 2
    for batch, length in ((1, 9), (5, 9), (3, 1), (2, 32)):
        inputs = inputs_of(manifest, batch, length)
        if manifest.inputs[0].pad is not None:
            inputs["tokens"][-1] = manifest.inputs[0].pad  # a row of padding alone
        with torch.inference_mode(), FeatureExtractor(module, ["*"]) as extractor:
            wanted = extractor.run(**{key: torch.from_numpy(value) for key, value in inputs.items()})
        features = {path: wanted.features[path].numpy() for path in whole.layers}
        outputs, got = together.tapped(inputs, [Tap(path) for path in whole.layers], predict=True)
        close({tap.layer: value for tap, value in got.items()}, features)
        np.testing.assert_allclose(next(iter(outputs.values())), wanted.output.numpy(), atol=1e-4)
        for path, part in alone.items() if batch < 3 else ():
            close(part.tapped(inputs, [Tap(path)], predict=False)[1], {Tap(path): features[path]})


@pytest.mark.parametrize(
    ("name", "taps"),
    [
        ("transformer", ["blocks.0@mean", "blocks.1@cls", "blocks.1@last", "blocks.0@max", "norm@flatten@norm"]),
        ("transformer", ["blocks.0.attn@none", "blocks.0@proj8", "blocks.0@mean@fp16", "token@norm"]),
        ("resnet", ["layer1@mean", "layer2@max@norm", "pool@flatten", "bn@proj16:3", "head@none"]),
    ],
)
@pytest.mark.parametrize("predict", [True, False])
def test_reducers_mixed_taps_and_predictions_are_those_of_hooks(directories, name, taps, predict):
    manifest, engine = Manifest.read(directories[name]), hooks(directories[name])
    asked = [Tap(*tap.split("@", 1)) for tap in taps]
    inputs = inputs_of(manifest, 5, 20)
    if name == "transformer":
        inputs["tokens"][-1] = 256
    part = program(directories[name]).part({tap.layer for tap in asked}, predict)
    outputs, features = part.tapped(inputs, asked, predict)
    wanted_outputs, wanted = engine.tapped(inputs, asked, predict)
    close(features, wanted)
    close(outputs, wanted_outputs)
    assert bool(outputs) == predict


def test_a_reducer_that_does_not_fit_is_refused_as_hooks_refuse_it(directories):
    part = program(directories["resnet"]).part(["layer1"], predict=False)
    inputs = inputs_of(Manifest.read(directories["resnet"]), 1)
    with pytest.raises(InvalidArgument) as mine:
        part.tapped(inputs, [Tap("layer1", "cls")], predict=False)
    with pytest.raises(InvalidArgument) as theirs:
        hooks(directories["resnet"]).tapped(inputs, [Tap("layer1", "cls")], predict=False)
    assert str(mine.value) == str(theirs.value)


def test_a_part_ends_after_its_deepest_layer(directories):
    content = (directories["resnet"] / "model.onnx").read_bytes()
    values = Manifest.read(directories["resnet"]).onnx_values
    first, last = (cut(content, [values[path]]) for path in ("layer1", "layer2"))
    assert len(first) < len(last) / 3
    nodes = onnx.load_from_string(first).graph.node
    assert nodes[-1].output[0] == values["layer1"]


class Positive(nn.Module):
    """A ReLU that changes nothing on inputs of its range, a dropout after it, and a layer that is dead."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.relu = nn.ReLU()
        self.drop = nn.Dropout()
        self.dead = nn.Linear(4, 4)
        nn.init.uniform_(self.first.weight, 0.1, 0.9)
        nn.init.uniform_(self.first.bias, 0.1, 0.9)
        nn.init.zeros_(self.dead.weight)

    def forward(self, x):
        x = self.drop(self.relu(self.first(x)))
        return x + self.dead(x)


def test_values_that_are_equal_by_accident_are_told_apart_or_left_out(tmp_path):
    spec = {"datatype": "FP32", "shape": [-1, 4]}
    card = {
        "name": "m", "architecture": "test_onnx_layers:Positive", "arguments": {},
        "inputs": [{"name": "x", "range": [0, 1], **spec}], "outputs": [{"name": "output", **spec}],
    }  # fmt: skip
    module = Positive().eval()
    directory = write(module, card, tmp_path)
    assert Manifest.read(directory).onnx_values.keys() == {"first", "relu"}
    below = np.full((2, 4), -3, "f4")
    got = program(directory).part(["first", "relu"], predict=False)
    _, features = got.tapped({"x": below}, [Tap("first"), Tap("relu")], predict=False)
    with torch.inference_mode():
        np.testing.assert_allclose(features[Tap("first")], module.first(torch.from_numpy(below)), atol=1e-5)
    assert (features[Tap("first")] < 0).all()
    assert (features[Tap("relu")] == 0).all()


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
    sets: list[frozenset[str]] = []
    part = OnnxProgram.part

    def noted(self: OnnxProgram, layers, predict: bool):
        sets.append(frozenset(layers))
        return part(self, layers, predict)

    monkeypatch.setattr(OnnxProgram, "part", noted)
    return sets


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
    edit(copied, lambda manifest: manifest["onnx_values"].update(values))
    return copied


def edit(directory: Path, change) -> None:
    path = directory / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


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


def test_an_older_manifest_loads_and_its_layers_are_read_by_hooks(directories, tmp_path):
    directory = shutil.copytree(directories["shared"], tmp_path / "shared" / "1")

    def age(manifest: dict) -> None:
        assert manifest.pop("onnx_values")
        manifest["schema_version"] = 1

    edit(directory, age)
    assert isinstance(load(directory, ModelSettings(), 1).runner.taps, EagerEngine)
    assert isinstance(load(directories["shared"], ModelSettings(), 1).runner.taps, TappedEngine)
    assert isinstance(load(directories["shared"], ModelSettings(engine="eager"), 1).runner.taps, EagerEngine)


def test_a_server_counts_what_read_the_layers_of_a_batch(served, modules):
    def count() -> float:
        of = served.server.metrics.feature_batches
        return sum(of.labels("mnist", "1", engine).value for engine in ("eager", "onnx"))

    def early() -> float:
        samples = served.server.metrics.early_exits.labels("mnist", "1").samples()
        return next(value for name, _, value in samples if name == "_count")

    before, stopped, x = count(), early(), rows_for("mnist", 4)
    for _ in range(20):
        got = arrays(extract(served, "mnist", x, ["net.0", "net.2@norm"]).layers)
    assert count() == before + 20
    assert early() == stopped + 20, "whichever way they are read"
    with torch.inference_mode():
        inside = modules["mnist"].net[0](torch.from_numpy(x).flatten(1)).numpy()
    np.testing.assert_allclose(got["net.0"], inside, atol=1e-4)


def untrusted(directory: Path, tmp_path: Path) -> Path:
    copied = shutil.copytree(directory, tmp_path / directory.parent.name / "1")
    edit(copied, lambda manifest: manifest.update(architecture="elsewhere:Net"))
    return copied


def test_layers_of_a_module_that_is_not_built_come_from_the_program(directories, tmp_path):
    untrusted(directories["transformer"], tmp_path)
    x = rows_for("transformer", 3, 20)
    with running(tmp_path) as server:
        for taps in (["blocks.0@mean", "blocks.1@last"], ["norm"]):
            got = arrays(extract(server, "transformer", x, taps).layers)
            for _ in range(8):
                close(arrays(extract(server, "transformer", x, taps).layers), got)
            wanted = hooks(directories["transformer"]).tapped(
                {"tokens": x}, [Tap(*tap.split("@")) for tap in taps], False
            )
            close({tap: got[tap] for tap in taps}, dict(zip(taps, wanted[1].values(), strict=True)))
        layers = {layer.path: layer for layer in server.server.repository.find("transformer", "").manifest.layers}
        assert "--trust elsewhere:Net" in layers["blocks.0.attn.weights"].reason
        assert layers["blocks.0"].available


@pytest.mark.parametrize(
    ("settings", "cut_for"),
    [
        ({"features": "false"}, []),
        ({"feature_layers": ("layer1.0",)}, [{"layer1.0"}]),
        ({"feature_layers": ("layer1.0.conv1",)}, []),  # which has no value in the program
    ],
)
def test_nothing_is_compiled_for_layers_that_the_settings_keep_back(directories, tmp_path, compiled, settings, cut_for):
    loaded = load(untrusted(directories["resnet"], tmp_path), ModelSettings(**settings), 1)
    assert compiled == cut_for
    assert [layer.path for layer in loaded.manifest.layers if layer.available] == [
        path for layers in cut_for for path in layers
    ]
    assert (loaded.runner.taps is None) == (not cut_for)


def test_a_manifest_that_names_values_of_other_shapes_gets_no_layers(directories, tmp_path):
    directory = untrusted(directories["resnet"], tmp_path)
    edit(directory, lambda manifest: manifest["onnx_values"].update(layer1=manifest["onnx_values"]["layer2"]))
    loaded = load(directory, ModelSettings(), 1)
    assert loaded.runner.taps is None
    assert loaded.note.startswith("layers are not available: ")
    assert not any(layer.available for layer in loaded.manifest.layers)


def test_what_a_branch_reads_from_outside_is_kept():
    float_value = partial(helper.make_tensor_value_info, elem_type=TensorProto.FLOAT)
    branches = {
        name: helper.make_graph(
            [helper.make_node("Add" if name == "then_branch" else "Sub", ["x", "doubled"], [name])],
            name, [], [float_value(name, shape=[2])],
        )
        for name in ("then_branch", "else_branch")
    }  # fmt: skip
    nodes = [
        helper.make_node("Add", ["x", "x"], ["doubled"]),
        helper.make_node("ReduceMax", ["x"], ["largest"], keepdims=0),
        helper.make_node("Greater", ["largest", "zero"], ["positive"]),
        helper.make_node("If", ["positive"], ["chosen"], **branches),
        helper.make_node("Neg", ["chosen"], ["y"]),
    ]
    zero = helper.make_tensor("zero", TensorProto.FLOAT, [], [0.0])
    inside = [float_value("chosen", shape=[2])]
    graph = helper.make_graph(
        nodes, "g", [float_value("x", shape=[2])], [float_value("y", shape=[2])], [zero], value_info=inside
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    part = cut(model.SerializeToString(), ["chosen"])
    assert [node.op_type for node in onnx.load_from_string(part).graph.node] == ["Add", "ReduceMax", "Greater", "If"]
    session = onnxruntime.InferenceSession(part, providers=["CPUExecutionProvider"])
    for x, wanted in (([1, 2], [3, 6]), ([-1, -2], [1, 2])):
        np.testing.assert_array_equal(session.run(None, {"x": np.array(x, "f4")})[0], wanted)


def test_tensors_in_other_files_are_not_followed():
    weight = TensorProto(name="w", dims=[2], data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    weight.external_data.add(key="location", value="../../secret")
    put = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "g", put[:1], put[1:], [weight])
    with pytest.raises(CutError, match="tensors are in other files"):
        cut(helper.make_model(graph).SerializeToString(), ["y"])
    with pytest.raises(CutError, match="no ONNX model"):
        values_of(b"no model")
