"""Batches in memory that is used again: every row has its own values, and no answer sees another's."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from numeric import Model, asked, identity, numeric
from test_server_inference import values_of
from torch import nn

from layercast.models.manifest import FileEntry, Manifest, TensorSpec
from layercast.server import runner as runners
from layercast.server.engines.base import Inputs, Outputs
from layercast.server.engines.eager import EagerEngine
from layercast.server.engines.place import at
from layercast.server.engines.programs import ProgramEngine
from layercast.server.runner import Runner
from layercast.server.settings import ModelSettings
from layercast.server.work import Tap, Work

ENTRY = FileEntry(sha256="0" * 64, bytes=0)
MARKER = 424242


class Function:
    """An engine that is a line of numpy, and shows the batches that it was given."""

    name = "numpy"
    device = "cpu"

    def __init__(self, function: Callable[[np.ndarray], np.ndarray]) -> None:
        self.function = function
        self.batches: list[np.ndarray] = []

    def run(self, inputs: Inputs) -> Outputs:
        self.batches.append(inputs["x"])
        return {"y": self.function(inputs["x"])}

    def tapped(self, inputs: Inputs, taps: list[Tap], predict: bool, edits=()):
        return self.run(inputs) if predict else {}, {tap: self.function(inputs["x"]) for tap in taps}


def manifest_of(pad: int | None = None, datatype: str = "FP32") -> Manifest:
    return Manifest(
        name="m", version=1, architecture="numpy",
        inputs=(TensorSpec(name="x", datatype=datatype, shape=(-1, -1), pad=pad),),
        outputs=(TensorSpec(name="y", datatype=datatype, shape=(-1, -1)),),
        files={"weights.safetensors": ENTRY, "golden.safetensors": ENTRY},
    )  # fmt: skip


def runner(engine: Function, pad: int | None = None, datatype: str = "FP32") -> Runner:
    return Runner(manifest_of(pad, datatype), engine, engine, engine)  # type: ignore[arg-type]


class WritesItsInput(nn.Module):
    """A first layer that works in place, as many do."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.relu(x.sub_(1))


def work(array: np.ndarray, taps: tuple[Tap, ...] = ()) -> Work:
    array.flags.writeable = False
    return Work({"x": array}, len(array), None, taps=taps)


@pytest.fixture(params=[1, 1 << 62], ids=["reused", "fresh"])
def memory(request, monkeypatch) -> bool:
    """Let every batch lie in memory that is used again, or none."""
    monkeypatch.setattr(runners, "_LARGE", request.param)
    return request.param == 1


VIEWS = {
    "identity": lambda x: x,
    "slice": lambda x: x[:, ::-1],
    "transposed": lambda x: x.reshape(-1, 2, x.shape[1] // 2).transpose(0, 2, 1),
    "computed": lambda x: x * 2,
}


@pytest.mark.parametrize("function", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("taps", [(), (Tap("layer"),)], ids=["outputs", "layers"])
def test_answers_keep_their_values_when_the_next_batch_is_written(memory, function, taps):
    engine = Function(function)
    run = runner(engine)
    batches = [[np.random.default_rng(at).random((rows, 8), "f4") for rows in (1, 3)] for at in range(3)]
    answers = [(x, own) for given in batches for x, own in zip(given, run([work(x, taps) for x in given]), strict=True)]
    for x, own in answers:
        for values in (*own.outputs.values(), *own.features.values()):
            np.testing.assert_array_equal(values, function(x))
            assert not memory or not any(np.shares_memory(values, batch) for batch in engine.batches)
        assert len(own.features) == len(taps)
    assert np.shares_memory(engine.batches[0], engine.batches[-1]) == memory


def test_texts_of_other_lengths_are_padded_and_never_with_what_was_there_before(memory):
    engine = Function(lambda x: x.copy())
    run = runner(engine, pad=7, datatype="INT64")
    run([work(np.full((4, 50), MARKER)), work(np.full((4, 50), MARKER))])
    short = [np.arange(length, dtype="i8")[None].repeat(rows, 0) for rows, length in ((2, 3), (1, 9), (3, 1))]
    answers = run([work(x) for x in short])
    for x, own in zip(short, answers, strict=True):
        values = own.outputs["y"]
        assert values.shape == (len(x), 9)
        np.testing.assert_array_equal(values[:, : x.shape[1]], x)
        assert (values[:, x.shape[1] :] == 7).all()


def test_batches_grow_shrink_and_change_their_shape(memory):
    engine = Function(lambda x: x + 1)
    run = runner(engine)
    for rows, width in ((1, 4), (5, 6), (2, 2), (8, 6), (1, 1)):
        given = [np.random.default_rng(rows).random((rows, width), "f4") for _ in range(3)]
        for x, own in zip(given, run([work(x) for x in given]), strict=True):
            np.testing.assert_array_equal(own.outputs["y"], x + 1)


def test_strings_are_joined(memory):
    run = runner(Function(lambda x: x), datatype="BYTES")
    given = [np.array([[b"one"]], object), np.array([[b"two"], [b"three"]], object)]
    answers = run([work(x) for x in given])
    assert [own.outputs["y"].tolist() for own in answers] == [x.tolist() for x in given]


@pytest.mark.parametrize("datatype", ["FP32", "BF16"])
@pytest.mark.parametrize("engine", ["eager", "torchscript"])
def test_a_module_that_writes_into_its_input_changes_no_array(engine, datatype):
    manifest, module, cpu = manifest_of(datatype=datatype), WritesItsInput().eval(), torch.device("cpu")
    runs = EagerEngine(module, manifest, cpu)
    if engine == "torchscript":
        runs = ProgramEngine(engine, module, manifest, at(cpu, manifest.inputs))
    joined = np.arange(8, dtype="f4").reshape(2, 4)
    for _ in range(2):
        np.testing.assert_array_equal(runs.run({"x": joined})["y"], np.maximum(joined - 1, 0))
    np.testing.assert_array_equal(joined, np.arange(8, dtype="f4").reshape(2, 4))


def test_a_served_identity_never_shows_a_secret_of_another_request(memory):
    settings = ModelSettings(max_batch=8, max_delay_ms=2)

    def ask(at: int) -> bool:
        x = np.full((1 + at % 3, 6), at if at % 2 else MARKER + at, "f4")
        return bool((values_of(server.call("ModelInfer", asked("echo", x))) == x).all())

    with numeric({"echo": Model(identity, settings=settings)}) as server, ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(400)))
