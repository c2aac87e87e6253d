"""Layers of networks that make hooks go wrong, as served, against hooks written by hand on the original."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import odd_networks
import pytest
import torch
from odd_networks import SHAPES
from serving import Running, running
from test_server_inference import wait_until
from tiny import edit_manifest
from torch import Tensor, nn

from layercast.client import Client, InvalidArgument
from layercast.client.errors import ResourceExhausted
from layercast.models import registry
from layercast.models.export.writer import export_artefact
from layercast.models.foreign.factory import Code, build
from layercast.models.foreign.trust import ARTEFACT_CODE, Trust
from layercast.models.manifest import Manifest
from layercast.server.errors import InvalidArgument as Refused
from layercast.server.work import Tap

FILE = Path(odd_networks.__file__)
CODE = Code(FILE.name, FILE.read_bytes(), FILE)
TRUST = Trust.of([ARTEFACT_CODE])
ZOO = {
    "simple": ("SimpleNet", {}),
    "mlp": ("MLP", {"hidden_sizes": [16, 8], "activation_name": "gelu"}),
    "squeezed": ("ResNetLike", {"squeeze_excitation": True}),
    "post-norm": ("TransformerEncoder", {"embed_dim": 16, "num_heads": 2, "ff_dim": 16, "norm_first": False}),
    "causal": ("TransformerEncoder", {"embed_dim": 16, "num_heads": 2, "ff_dim": 16, "causal": True}),
}
"""What the test models of every other file do not have: the rest of our architectures, and their variants."""
EVERY = (*SHAPES, *ZOO)


@dataclass
class Odd:
    """A server of the odd networks, the repository it reads, and the originals."""

    server: Running
    repository: Path
    modules: dict[str, nn.Module]


def export(module: nn.Module, name: str, directory: Path) -> None:
    with torch.inference_mode():
        shape = list(module(torch.from_numpy(rows_of(name, 2))).shape[1:])
    architecture, arguments = ZOO.get(name, (f"{FILE.name}:{name}", {}))
    given = {"name": "x", "datatype": "FP32", "shape": [-1, *SHAPES.get(name, ())]}
    inputs = [spec.model_dump() for spec in registry.input_specs(module)] if name in ZOO else [given]
    card = {
        "name": name, "architecture": architecture, "arguments": arguments, "inputs": inputs,
        "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, *shape]}],
    }  # fmt: skip
    export_artefact(module, card, directory, programs=(), code=None if name in ZOO else CODE)


def original(name: str) -> nn.Module:
    torch.manual_seed(3)
    if name in ZOO:
        architecture, arguments = ZOO[name]
        module = registry.build(architecture, **arguments).eval()
    else:
        module = build(f"{FILE.name}:{name}", {}, TRUST, CODE).eval()
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.uniform_(-0.2, 0.2)
            part.running_var.uniform_(0.5, 1.5)
    return module


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    root = tmp_path_factory.mktemp("odd")
    modules = {name: original(name) for name in EVERY}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so little work is only slowed down by threads that wait for each other
    for name, module in modules.items():
        export(module, name, root / name / "1")
    torch.set_num_threads(threads)
    # As if another torch had made the index: it has a layer that is never called here.
    edit_manifest(root / "Aside/1", claim_around)
    with running(root, engine="eager", trust=[ARTEFACT_CODE], max_batch=8, max_delay_ms=0) as server:
        yield Odd(server, root, modules)


def claim_around(manifest) -> None:
    (layer,) = [layer for layer in manifest["layers"] if layer["path"] == "around"]
    layer |= {"available": True, "reason": "", "shape": [-1, 6], "datatype": "FP32", "order": 0}


@dataclass
class Seen:
    """What one tensor was when it was returned, and the tensor itself."""

    value: Tensor
    tensor: Tensor


def by_hand(module: nn.Module, x: np.ndarray) -> dict[str, Seen]:
    """Every tensor that every module returned in one forward, by the names of an index; written without layercast."""
    calls: dict[str, list[list[tuple[str, Seen]]]] = {}

    def parts(value: object, key: str = ""):
        if isinstance(value, Tensor):
            yield key, Seen(value.clone(), value)
        elif isinstance(value, dict):
            for name, inner in value.items():
                yield from parts(inner, f"{key}[{name}]")
        elif isinstance(value, tuple | list):
            for place, inner in enumerate(value):
                yield from parts(inner, f"{key}[{place}]")

    def keep(path: str):
        return lambda _module, _inputs, output: calls.setdefault(path, []).append(list(parts(output)))

    handles = [part.register_forward_hook(keep(path)) for path, part in module.named_modules() if path]
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.inference_mode():
            module(torch.from_numpy(x.copy()))
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
        for handle in handles:
            handle.remove()
    return {
        f"{path}#{number}{key}" if len(each) > 1 else f"{path}{key}": seen
        for path, each in calls.items()
        for number, found in enumerate(each)
        for key, seen in found
    }


def rows_of(name: str, rows: int, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    if name in SHAPES:
        return random.standard_normal((rows, *SHAPES[name]), "f4")
    if ZOO[name][0] != "TransformerEncoder":
        return random.random((rows, *{"squeezed": (3, 32, 32)}.get(name, (784,))), "f4")
    tokens = random.integers(0, 256, (rows, 16))  # a length that shares forwards with plain requests
    tokens[1:, 10:] = 256  # padding
    return tokens


def assert_equal(got: dict[str, np.ndarray], x: np.ndarray, module: nn.Module) -> None:
    wanted = by_hand(module, x)
    for path, values in got.items():
        if path.endswith("[weights]"):  # what torch's attention computes and does not return
            np.testing.assert_allclose(values.sum(-1), 1, atol=1e-5, err_msg=path)
            continue
        np.testing.assert_allclose(values, wanted[path].value.numpy(), atol=1e-6, rtol=1e-5, err_msg=path)


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("name", EVERY)
def test_every_layer_is_what_its_module_returned(odd, name, rows):
    x = rows_of(name, rows)
    with Client(odd.server.url) as client:
        listed = {layer.path: layer for layer in client.layers(name)}
        got = client.features(name, x, "*")
    assert set(got) == {path for path, layer in listed.items() if layer.available}
    assert_equal(got, x, odd.modules[name])
    # What computes and is not there is listed with the reason, nothing is left out in silence.
    for path in {*by_hand(odd.modules[name], x)} - set(got):
        assert listed[path].reason
    named = {path for path, _ in odd.modules[name].named_modules() if path}
    assert named == {path.partition("#")[0].partition("[")[0] for path in listed}


@pytest.mark.parametrize("name", EVERY)
def test_in_a_batch_with_others_each_gets_its_own(odd, name):
    """Rows of a plain request, of one that taps every layer and of one that taps one, in one forward."""
    model = odd.server.server.repository.find(name, "")
    xs = [rows_of(name, rows, seed) for seed, rows in enumerate((1, 2, 3))]
    before = model.monitor.statistics.executions
    odd.server.on_loop(model.batcher.hold)
    first = next(layer.path for layer in model.manifest.layers if layer.available)
    with Client(odd.server.url) as client, ThreadPoolExecutor(3) as pool:
        calls = [
            pool.submit(client.predict, name, xs[0]),
            pool.submit(client.features, name, xs[1], "*", outputs="y"),
            pool.submit(client.features, name, xs[2], first),
        ]
        wait_until(odd.server, lambda: model.batcher.queued_rows == 6)
        odd.server.on_loop(model.batcher.release)
        plain, every, one = (call.result() for call in calls)
    assert model.monitor.statistics.executions == before + 1
    with torch.inference_mode():
        for x, got in ((xs[0], plain), (xs[1], every.pop("y"))):
            np.testing.assert_allclose(got, odd.modules[name](torch.from_numpy(x)).numpy(), atol=1e-5)
    assert_equal(every, xs[1], odd.modules[name])
    assert_equal(one, xs[2], odd.modules[name])
    assert list(one) == [first]


def test_only_what_changes_later_is_copied(odd):
    """The index marks exactly the tensors that are not any more what they were when they were returned."""
    for name, module in odd.modules.items():
        seen = by_hand(module, rows_of(name, 3, seed=7))
        changed = {path for path, each in seen.items() if not torch.equal(each.value, each.tensor)}
        layers = Manifest.read(odd.repository / name / "1").layers
        marked = {layer.path for layer in layers if layer.clone}
        assert marked == changed & {layer.path for layer in layers if layer.available}, name
    layers = Manifest.read(odd.repository / "InPlace/1").layers_by_path
    assert {path for path, layer in layers.items() if layer.clone} >= {"norm", "act", "last"}
    assert not layers["kept"].clone


def test_a_tied_weight_is_one_and_both_layers_are_right(odd):
    module = odd.server.server.repository.find("Tied", "").loaded.runner.eager._module
    assert module.head.weight is module.embed.weight
    layers = Manifest.read(odd.repository / "Tied/1").layers_by_path
    assert layers["embed"].parameters == layers["head"].parameters == 24


def test_parts_have_names_and_what_is_no_row_has_a_reason(odd):
    with Client(odd.server.url) as client:
        listed = {layer.path: layer for layer in client.layers("Parts")}
        assert [path for path in listed if path.startswith("split[")] == ["split[0]", "split[1][halves][0]",
                                                                          "split[1][halves][1]"]  # fmt: skip
        got = client.features("Parts", rows_of("Parts", 2), "split")
        assert len(got) == 3
        with pytest.raises(InvalidArgument, match=r"'lstm\[1\]\[0\]' can't be tapped: dimension 0 is not the batch"):
            client.features("Parts", rows_of("Parts", 2), "lstm[1][0]")


@pytest.mark.parametrize(
    ("name", "layer", "reason"),
    [
        ("Fused", "post.layers.0.self_attn.out_proj", "never called in eval mode: its parent computes without calling"),
        ("Aside", "unused", "never called in eval mode"),
        ("Aside", "around", "gave no value when the version was loaded: its parent computes without calling it here"),
    ],
)
def test_a_module_that_no_hook_can_see_is_refused_with_the_reason(odd, name, layer, reason):
    with Client(odd.server.url) as client:
        (listed,) = client.layers(name, layer)
        assert (listed.available, listed.reason.startswith(reason)) == (False, True)
        with pytest.raises(InvalidArgument, match=f"layer '{layer}' can't be tapped: {reason}"):
            client.features(name, rows_of(name, 1), layer)
        client.features(name, rows_of(name, 1), "*")  # leaves it out


def test_torchs_fused_path_stays_on_for_plain_forwards(odd):
    with Client(odd.server.url) as client:
        attended = client.features("Fused", rows_of("Fused", 2), "post.layers.*.self_attn")
        parts = ("[0]", "[weights]")
        assert list(attended) == [f"post.layers.{at}.self_attn{part}" for at in (0, 1) for part in parts]
    assert torch.backends.mha.get_fastpath_enabled()


def test_sixty_four_threads_each_get_the_layers_they_ask_for(odd):
    """Different layers, in different forms, of the same model, all at once: every answer is right, no hook stays."""
    name = "Mobile"
    model = odd.server.server.repository.find(name, "")
    paths = [layer.path for layer in model.manifest.layers if layer.available]
    forms = [(path, form) for path in paths for form in ("", "@mean", "@flatten")]
    ready = threading.Barrier(64)

    def ask(number: int) -> None:
        path, form = forms[number % len(forms)]
        x = rows_of(name, 1 + number % 3, number)
        wanted = by_hand_alone(odd, name, x)[path]
        ready.wait(30)
        got = client.features(name, x, path + form)
        if form == "@mean" and wanted.ndim > 2:
            wanted = wanted.mean((2, 3))
        np.testing.assert_allclose(
            got[path + form], wanted.reshape(len(x), -1) if form == "@flatten" else wanted, atol=1e-6, rtol=1e-4
        )

    with Client(odd.server.url) as client, ThreadPoolExecutor(64) as pool:
        for done in [pool.submit(ask, number) for number in range(192)]:
            done.result()
    assert model.loaded.runner.eager.hooks == 0


_one_forward = threading.Lock()


def by_hand_alone(odd: Odd, name: str, x: np.ndarray) -> dict[str, np.ndarray]:
    with _one_forward:  # the hooks by hand sit on one module
        return {path: seen.value.numpy() for path, seen in by_hand(odd.modules[name], x).items()}


def test_no_hook_stays_after_ten_thousand_calls_some_of_which_fail(odd):
    engine = odd.server.server.repository.find("Again", "").loaded.runner.eager
    x = {"x": rows_of("Again", 1)}
    paths = [layer.path for layer in engine.manifest.layers if layer.available]
    for number in range(10_000):
        if number % 100 == 0:
            with pytest.raises(Refused):
                engine.tapped(x, [Tap("step#1", "cls")], predict=False)
        else:
            engine.tapped(x, [Tap(paths[number % len(paths)])], predict=number % 2 == 0)
    assert engine.hooks == 0
    with Client(odd.server.url) as client:
        assert_equal(client.features("Again", rows_of("Again", 2), "*"), rows_of("Again", 2), odd.modules["Again"])


def test_a_name_that_could_be_several_is_answered_with_the_nearest(odd):
    with Client(odd.server.url) as client:
        for asked, near in (("norm1", "blocks.0.norm1, blocks.1.norm1"), ("blocks.0.fc3", "blocks.0.fc1"),
                            ("type:Lineer", "type:Linear")):  # fmt: skip
            with pytest.raises(InvalidArgument, match=f"nearest: .*{near}"):
                client.features("Vision", rows_of("Vision", 1), asked)


def test_sizes_are_refused_before_a_row_runs(odd):
    model = odd.server.server.repository.find("Strided", "")
    before = model.monitor.statistics.executions
    x = np.zeros((120_000, *SHAPES["Strided"]), "f4")
    with Client(odd.server.url) as client, pytest.raises(ResourceExhausted, match="answer holds"):
        client.features("Strided", x, "conv")
    assert model.monitor.statistics.executions == before
