"""What the stand-in for a card is held to elsewhere, on a real one. Skipped where torch finds none."""

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from batching import batching, until
from conftest import card_of
from serving import running
from test_gpu_engines import Computes, Waits, eager
from test_server_inference import offline, rows_for

from layercast.models.export.writer import export_artefact
from layercast.models.hooks import FeatureExtractor
from layercast.models.manifest import Manifest
from layercast.server.engines import cuda
from layercast.server.engines.golden import Tolerance
from layercast.server.errors import OutOfMemory
from layercast.server.gpus import Gpus
from layercast.server.loader import load
from layercast.server.metrics import Metrics
from layercast.server.settings import ModelSettings
from layercast.server.work import Tap, Work

pytestmark = pytest.mark.skipif(not cuda.count(), reason="needs a CUDA device that torch can use")


@pytest.fixture(scope="module")
def root(modules, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("gpu")
    for name in ("resnet", "transformer"):
        export_artefact(modules[name], card_of(name), root / name / "1", programs=("torchscript", "onnx"))
    return root


@pytest.mark.parametrize("engine", ["auto", "eager", "onnx", "torchscript"])
@pytest.mark.parametrize("name", ["resnet", "transformer"])
def test_every_engine_gives_what_the_cpu_gives(root, modules, name, engine):
    runner = load(root / name / "1", ModelSettings(device="cuda", engine=engine, max_batch=8), 2).runner
    assert runner.fast.device == "cuda"
    input_name = Manifest.read(root / name / "1").inputs[0].name
    for rows, length in ((1, 16), (8, 7), (3, 32), (5, 20), (8, 32), (2, 1), (11, 9)):
        x = rows_for(name, rows, length)
        got = runner.fast.run({input_name: x})["logits"]
        np.testing.assert_allclose(got, offline(modules[name], x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["resnet", "transformer"])
def test_the_zoos_architectures_can_be_recorded(root, name, caplog):
    runner = load(root / name / "1", ModelSettings(device="cuda", engine="eager", max_batch=8), 2).runner
    assert runner.eager is not None
    assert runner.eager._graphs is not None, caplog.text


@pytest.mark.parametrize("module", [Waits(), Computes()], ids=["waits", "computes"])
def test_what_cannot_be_recorded_runs_layer_by_layer(tmp_path, caplog, module):
    directory = tiny.write(tmp_path, 1, seed=1)
    if isinstance(module, Computes):
        module.forward = lambda x: x + float(x.cpu().numpy().sum())
    engine = eager(module.eval(), directory)
    assert engine._graphs is None
    assert "no CUDA graphs, every batch runs layer by layer" in caplog.text
    for sign in (1, -1):
        x = sign * tiny.ROWS
        wanted = (x * 2 if x.sum() > 0 else x) if isinstance(module, Waits) else x + x.sum()
        np.testing.assert_allclose(engine.run({"x": x})["output"], wanted, rtol=1e-4)


def test_layers_are_reduced_on_the_card(root, modules):
    runner = load(root / "transformer" / "1", ModelSettings(device="cuda", engine="eager", max_batch=8), 2).runner
    tokens = rows_for("transformer", 5, 20)
    taps = [Tap("blocks.0", reducer) for reducer in ("mean", "last", "norm", "proj4", "none")]
    assert runner.eager is not None
    outputs, features = runner.eager.tapped({"tokens": tokens}, taps, predict=True)
    np.testing.assert_allclose(outputs["logits"], offline(modules["transformer"], tokens), atol=1e-3)
    for tap in taps:
        name = tap.layer if tap.reducer == "none" else f"{tap.layer}@{tap.reducer}"
        with torch.inference_mode(), FeatureExtractor(modules["transformer"], [name]) as extractor:
            mask = torch.from_numpy(tokens != 256)
            (wanted,) = extractor.run(torch.from_numpy(tokens), token_mask=mask).features.values()
        np.testing.assert_allclose(features[tap], wanted.numpy(), atol=1e-3)


def test_bf16_is_nearly_the_same(root, modules):
    settings = ModelSettings(device="cuda", precision="bf16", max_batch=8)
    fast = load(root / "resnet" / "1", settings, 2).runner.fast
    x = rows_for("resnet", 5)
    assert Tolerance("bf16").close(fast.run({"image": x})["logits"], offline(modules["resnet"], x))


def test_instances_compute_beside_each_other_and_mix_no_rows(root, modules):
    settings = ModelSettings(device="cuda", engine="eager", max_batch=8, instances=3)
    model = load(root / "resnet" / "1", settings, 3)
    assert model.cards == tuple(at % cuda.count() for at in range(3))
    x = rows_for("resnet", 64)
    wanted = offline(modules["resnet"], x)

    def run(at: int) -> None:
        rng = np.random.default_rng(at)
        for _ in range(200):
            chosen = rng.integers(0, 64, rng.integers(1, 10))
            got = model.runners[at].fast.run({"image": x[chosen]})["logits"]
            np.testing.assert_allclose(got, wanted[chosen], rtol=1e-3, atol=1e-3)

    with ThreadPoolExecutor(3) as threads:
        list(threads.map(run, range(3)))


def test_a_server_answers_from_a_card_and_loads_beside(root, modules):
    with running(root, device="cuda", max_batch=8, instances=2, model_control="explicit") as server:
        from test_server_inference import request, values_of

        from layercast.proto.messages import RepositoryModelLoadRequest

        x = rows_for("resnet", 3)
        wanted = offline(modules["resnet"], x)
        with ThreadPoolExecutor(4) as threads:
            asked = [threads.submit(server.call, "ModelInfer", request("resnet", x)) for _ in range(100)]
            server.call("RepositoryModelLoad", RepositoryModelLoadRequest(model_name="transformer"), timeout=120)
            for one in asked:
                np.testing.assert_allclose(values_of(one.result()), wanted, rtol=1e-3, atol=1e-3)


@pytest.fixture
def capped() -> Iterator[None]:
    yield
    torch.cuda.set_per_process_memory_fraction(1.0, 0)
    torch.cuda.empty_cache()


async def test_memory_that_runs_out_halves_the_batch_and_refuses_only_the_culprit(root, modules, capped):
    runner = load(root / "resnet" / "1", ModelSettings(device="cuda:0", engine="eager", max_batch=1), 2).runner
    assert runner.eager is not None
    tap = Tap("layer1", "mean")

    def peak(rows: int) -> int:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(0)
        runner.eager.tapped({"image": rows_for("resnet", rows)}, [tap], predict=False)
        return torch.cuda.max_memory_reserved(0)

    room = (peak(256) + peak(1024)) // 2
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(room / torch.cuda.get_device_properties(0).total_memory, 0)
    async with batching(runner, max_batch=4096, queue_rows=10_000) as (batcher, recorder):
        batcher.hold()
        x = rows_for("resnet", 4096)
        works = [
            Work({"image": x[:rows]}, rows, "k", taps=(tap,), predict=False) for rows in (128, 128, 128, 128, 2048)
        ]
        asked = [asyncio.create_task(batcher.submit([one])) for one in works]
        await until(lambda: recorder.waiting == 2560)
        batcher.release()
        *answers, error = await asyncio.gather(*asked, return_exceptions=True)
    assert isinstance(error, OutOfMemory)
    assert "2048 rows of model 'resnet' together take more memory than the GPU has left" in str(error)
    with torch.inference_mode(), FeatureExtractor(modules["resnet"], ["layer1@mean"]) as extractor:
        (wanted,) = extractor.run(torch.from_numpy(x[:128])).features.values()
    for (answer,) in answers:
        np.testing.assert_allclose(answer.features[tap], wanted.numpy(), rtol=1e-3, atol=1e-3)


async def test_the_gauges_of_this_machines_cards():
    pytest.importorskip("pynvml", reason="needs the package nvidia-ml-py")
    torch.ones(1, device="cuda")
    gpus: Gpus = Metrics().gpus
    async with asyncio.timeout(10):
        while not gpus._readings:
            await gpus.refresh()
    assert all(0 < reading.used <= reading.total for reading in gpus._readings)
