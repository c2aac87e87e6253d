"""New and broken versions under load: who answers, and with which weights."""

import gc
import os
import shutil
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from serving import running

from layercast.models.manifest import file_entry
from layercast.proto.messages import ModelReadyRequest, RepositoryModelUnloadRequest, ServerReadyRequest
from layercast.server.work import Terms

RELOADS = int(os.environ.get("LAYERCAST_TEST_RELOADS", "20"))
CLIENTS = 8


@pytest.fixture
def root(tmp_path):
    tiny.write(tmp_path, 1, seed=1)
    return tmp_path


@pytest.fixture
def server(root):
    with running(root, engine="eager", model_control="explicit") as server:
        yield server


def close(got: np.ndarray, seed: int) -> bool:
    return np.allclose(got, tiny.expected(seed), atol=1e-5)


@pytest.mark.parametrize("way", ["replaced", "beside"])
def test_reloads_under_load_fail_nothing_and_mix_nothing(server, root, way):
    """A version is replaced in its place, or a new one comes beside the old one, which then goes."""
    wanted = {seed: tiny.expected(seed) for seed in (1, 2)}
    done = threading.Event()

    def client() -> tuple[int, list[str]]:
        count, wrong = 0, []
        while not done.is_set():
            try:
                answer = server.call("ModelInfer", tiny.request())
            except grpc.RpcError as error:
                wrong.append(f"{error.code()}: {error.details()}")
                continue
            count += 1
            version = int(answer.model_version)
            seeds = (1, 2) if way == "replaced" else (1 if version % 2 else 2,)
            if not any(np.allclose(tiny.values(answer), wanted[seed], atol=1e-5) for seed in seeds):
                wrong.append(f"version {version} gave an answer of neither")
        return count, wrong

    with ThreadPoolExecutor(CLIENTS) as pool:
        clients = [pool.submit(client) for _ in range(CLIENTS)]
        try:
            for reload in range(1, RELOADS + 1):
                seed = 2 if reload % 2 else 1
                version = 1 if way == "replaced" else reload + 1
                tiny.write(root, version, seed)
                if way == "beside":
                    shutil.rmtree(root / "tiny" / str(version - 1))
                tiny.load(server)
                answer = server.call("ModelInfer", tiny.request())
                assert (answer.model_version, close(tiny.values(answer), seed)) == (str(version), True)
        finally:
            done.set()
        results = [client.result(60) for client in clients]
    assert [text for _, wrong in results for text in wrong] == []
    assert all(count > 0 for count, _ in results)
    assert list(tiny.index(server)) == [("tiny", "1" if way == "replaced" else str(RELOADS + 1))]


def truncate(directory) -> None:
    path = directory / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def rewrite(directory, change) -> None:
    """Change the weights and let the manifest agree, as an export of other weights with stale golden values would."""
    path = directory / "weights.safetensors"
    tensors = load_file(path)
    save_file(change(tensors), path)
    entry = file_entry(path).model_dump()
    tiny.edit_manifest(directory, lambda manifest: manifest["files"].update({path.name: entry}))


BROKEN = {
    "a truncated file": (truncate, r"weights\.safetensors has \d+ of \d+ bytes"),
    "a missing file": (lambda d: (d / "golden.safetensors").unlink(), r"golden\.safetensors is missing"),
    "no manifest": (lambda d: (d / "manifest.json").unlink(), r"manifest\.json is missing"),
    "a wrong shape": (lambda d: rewrite(d, lambda t: {k: v[:-1].clone() for k, v in t.items()}), "wants shape"),
    "NaN weights": (
        lambda d: rewrite(d, lambda t: {k: torch.full_like(v, float("nan")) for k, v in t.items()}),
        "is not a number where the export recorded",
    ),
    "other weights": (lambda d: rewrite(d, lambda t: {k: v + 1 for k, v in t.items()}), "differs by up to"),
    "a missing key": (lambda d: rewrite(d, lambda t: dict(list(t.items())[1:])), "missing"),
    "a link out": (
        lambda d: (shutil.move(d / "weights.safetensors", d.parents[2] / "out"), (d / "weights.safetensors").symlink_to(d.parents[2] / "out")),
        r"weights\.safetensors is a link that leads out of the repository",
    ),
    "a wrong setting": (
        lambda d: (d.parent / "layercast.toml").write_text("max_bacth = 3\n"),
        r"tiny/layercast\.toml: unknown setting 'max_bacth'; did you mean 'max_batch'",
    ),
    "settings in no encoding": (lambda d: (d.parent / "layercast.toml").write_bytes(b"\xff\xfe"), r"layercast\.toml: "),
}  # fmt: skip


@pytest.mark.parametrize("fault", BROKEN)
@pytest.mark.parametrize("version", [1, 2])
def test_a_broken_version_leaves_the_old_one_serving_and_says_why(tmp_path, fault, version):
    """The broken one comes in the place of version 1, or beside it."""
    damage, reason = BROKEN[fault]
    root = tmp_path / "repository"
    tiny.write(root, 1, seed=1)
    with running(root, engine="eager", model_control="explicit") as server:
        damage(tiny.write(root, version, seed=2))
        with pytest.raises(grpc.RpcError, match=reason) as raised:
            tiny.load(server)
        assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert str(tmp_path) not in raised.value.details()
        state, told = tiny.index(server)["tiny", str(version)]
        assert state == ("READY" if version == 1 else "UNAVAILABLE")
        assert told in raised.value.details()
        assert close(tiny.answered(server), 1)
        assert server.call("ServerReady", ServerReadyRequest()).ready
        ready = server.call("ModelReady", ModelReadyRequest(name="tiny", version=str(version))).ready
        assert ready == (version == 1)
        (root / "tiny" / "layercast.toml").unlink(missing_ok=True)
        tiny.write(root, version, seed=3)
        tiny.load(server)
        assert tiny.index(server)["tiny", str(version)] == ("READY", "")
        assert close(tiny.answered(server), 3)


def test_a_load_of_what_is_loaded_changes_nothing(server):
    before = server.server.repository.find("tiny", "")
    tiny.load(server)
    assert server.server.repository.find("tiny", "") is before


def test_changed_settings_are_a_reload(server, root):
    (root / "tiny" / "layercast.toml").write_text("max_batch = 5\n")
    tiny.load(server)
    assert server.server.repository.find("tiny", "").batcher.limits.max_batch == 5


def test_latest_serves_the_highest_version_that_loads(tmp_path):
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "layercast.toml").write_text('versions = "latest"\n')
    tiny.write(tmp_path, 1, seed=1)
    tiny.write(tmp_path, 2, seed=2)
    truncate(tiny.write(tmp_path, 3, seed=3))
    with running(tmp_path, engine="eager", model_control="explicit") as server:
        assert [(v, state) for (_, v), (state, _) in tiny.index(server).items() if state == "READY"] == [("2", "READY")]
        assert close(tiny.answered(server), 2)
        tiny.write(tmp_path, 3, seed=3)
        tiny.load(server)
        assert tiny.index(server) == {("tiny", "3"): ("READY", "")}
        assert close(tiny.answered(server), 3)


def test_a_request_that_waits_is_answered_by_the_version_it_came_to(server, root):
    old = server.server.repository.find("tiny", "")
    server.on_loop(old.batcher.hold)
    waiting = server.rpc("ModelInfer").future(tiny.request(), timeout=30)
    while not server.on_loop(lambda: old.batcher.queued_rows):
        pass
    tiny.write(root, 1, seed=2)
    tiny.load(server)
    assert close(tiny.answered(server), 2)
    assert close(tiny.values(waiting.result()), 1)


def test_a_request_that_is_still_decoded_is_answered_by_the_version_it_came_to(server, root):
    old = server.server.repository.find("tiny", "")
    server.on_loop(old.hold)
    try:
        tiny.write(root, 1, seed=2)
        tiny.load(server)
        assert close(tiny.answered(server), 2)
        answers = server.wait(old.run({"x": tiny.ROWS}, len(tiny.ROWS), (), True, Terms()))
        assert close(answers[0].outputs["output"], 1)
    finally:
        server.on_loop(old.let_go)
    while server.on_loop(lambda: server.server.repository._retiring):
        pass
    assert old.batcher.draining


HOSTILE = {
    "endless": lambda files: files["weights.safetensors"].update(bytes=1e999),
    "no file's name": lambda files: files.update({chr(0xD800): files["weights.safetensors"]}),
    "no text": lambda files: files.update({chr(0xDC80): files["weights.safetensors"]}),
    "a forged line": lambda files: files.update({"x\n\x1b[31m" + "y" * 5000: files["weights.safetensors"]}),
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_manifest_costs_nobody_else_anything(tmp_path, change):
    tiny.write(tmp_path, 1, seed=1)
    hostile = tiny.write(tmp_path, 1, seed=1, name="hostile")
    tiny.edit_manifest(hostile, lambda manifest: change(manifest["files"]))
    with running(tmp_path, engine="eager", model_control="explicit", watch=0.05) as server:
        while ("hostile", "1") not in tiny.index(server):  # watched, it might be a copy that goes on
            pass
        while tiny.index(server)["hostile", "1"][0] == "LOADING":
            pass
        state, reason = tiny.index(server)["hostile", "1"]
        assert (state, reason.isprintable(), len(reason) <= 1100) == ("UNAVAILABLE", True, True)
        with pytest.raises(grpc.RpcError) as refused:
            tiny.load(server, "hostile")
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        looks = server.server.watcher.looks
        while server.server.watcher.looks < looks + 2:
            pass
        assert close(tiny.answered(server), 1)


@pytest.mark.parametrize("way", ["unloaded", "replaced"])
def test_nothing_of_a_version_stays_in_memory(tmp_path, way):
    tiny.write(tmp_path, 1, seed=1, programs=("onnx", "torchscript"))
    with running(tmp_path, engine="onnx", model_control="explicit") as server:
        tiny.answered(server)
        model = server.server.repository.find("tiny", "")
        runner = model.loaded.runner
        gone = [weakref.ref(thing) for thing in (model.mark, runner.eager._module, runner.fast, runner.fast._session)]
        del model, runner
        gc.disable()
        try:
            if way == "unloaded":
                server.call("RepositoryModelUnload", RepositoryModelUnloadRequest(model_name="tiny"))
            else:
                tiny.write(tmp_path, 1, seed=2)
                (tmp_path / "tiny" / "layercast.toml").write_text('engine = "eager"\n')
                tiny.load(server)
            while server.on_loop(lambda: server.server.repository._retiring):
                pass
            server.on_loop(lambda: None)
            assert [reference() for reference in gone] == [None] * len(gone)
        finally:
            gc.enable()
