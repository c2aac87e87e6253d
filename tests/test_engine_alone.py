"""What runs a batch beside which nothing of its model runs: chosen at the load, kept, shown, and right in a server."""

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import test_engine_choice
import tiny
import torch
from serving import running
from test_engine_choice import SCRIPT, loaded
from test_server_inference import offline, request, rows_for, values_of

from layercast.proto.messages import ModelConfigRequest, ModelMetadataRequest
from layercast.server import environment, processors

artefact, timed = test_engine_choice.artefact, test_engine_choice.timed


def test_a_thread_keeps_its_number_of_torchs_threads_whatever_another_sets_before_it_computes():
    first, found = threading.Event(), []

    def prepared():
        processors.prepare(1)
        first.set()
        assert second.wait(20)
        found.append(torch.get_num_threads())

    second = threading.Event()
    thread = threading.Thread(target=prepared)
    thread.start()
    assert first.wait(20)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    second.set()
    thread.join()
    torch.set_num_threads(before)
    assert found == [1]


def test_a_lone_batch_has_all_processors_where_that_is_clearly_faster(artefact, tmp_path, timed):
    timed.gain, timed.part = 0.96, 0.7
    model = loaded(artefact, tmp_path)
    assert (model.engines, len(model.runners)) == ("2 instances: onnx (1 thread), alone: onnx (2 threads)", 2)
    sessions = [runner.fast._session for runner in (*model.runners, model.alone)]
    assert [session.get_session_options().intra_op_num_threads for session in sessions] == [1, 1, 2]
    engines = [runner.eager for runner in (*model.runners, model.alone)]
    assert len({tuple(tensor.data_ptr() for tensor in engine._module.parameters()) for engine in engines}) == 1
    assert len({id(engine._module) for engine in engines}) == 3
    assert model.memory_bytes == engines[0].memory_bytes
    timed.gain, timed.part = 0.0, 1.0
    again = loaded(artefact, tmp_path)
    assert (again.engines, again.alone is None) == (model.engines, False), "remembered"
    assert len(timed.tried) == 1


def test_a_lone_batch_runs_as_any_other_where_more_processors_gain_little(artefact, timed):
    timed.gain, timed.part = 2.0, 0.8
    model = loaded(artefact, None)
    assert (model.engines, model.alone) == ("2 instances: onnx (1 thread)", None)


def test_a_lone_batch_may_run_on_an_engine_of_torch_which_is_the_same_with_all_threads(artefact, timed):
    timed.chosen, timed.gain, timed.part = (SCRIPT,), 2.0, 0.5
    model = loaded(artefact, None)
    assert model.engines == "2 instances: onnx (1 thread), alone: torchscript (2 threads)"
    threads, place = [], model.alone.fast._place
    real = place.run

    def noted(inputs: Any, forward: Any) -> Any:
        threads.append(torch.get_num_threads())
        return real(inputs, forward)

    place.run = noted
    torch.set_num_threads(2)  # as its thread is prepared
    got = model.alone.fast.run({"x": tiny.ROWS})["output"]
    np.testing.assert_allclose(got, tiny.expected(1, tiny.ROWS), atol=1e-5)
    assert threads == [2]


def test_a_lone_request_and_many_at_once_are_answered_right_by_the_instances_that_were_chosen(
    repository, modules, tmp_path, timed, monkeypatch
):
    shutil.copytree(repository / "shared", tmp_path / "shared")
    monkeypatch.setattr(environment, "cpu_budget", lambda: 2)
    timed.gain, timed.part = 1.0, 0.5
    text, ran = "2 instances: onnx (1 thread), alone: onnx (2 threads)", []
    with running(tmp_path, max_batch=8, device="cpu", instances=0, cache=tmp_path / "cache") as server:
        metadata = server.call("ModelMetadata", ModelMetadataRequest(name="shared"))
        config = server.call("ModelConfig", ModelConfigRequest(name="shared")).config
        assert (metadata.properties["engine"], metadata.properties["engines"]) == ("onnx", text)
        assert config.instance_group[0].count == 2
        model = server.server.repository.find("shared", "").loaded
        meeting = threading.Barrier(2)

        def noted(name: str, run: Any, wait: bool) -> Any:
            def instead(inputs: Any) -> Any:
                ran.append((name, torch.get_num_threads()))
                if wait:
                    meeting.wait(20)
                return run(inputs)

            return instead

        def ask(values: Any) -> None:
            rows, outputs = values
            x = rows_for("shared", rows) + np.float32(rows)
            answer = server.call("ModelInfer", request("shared", x, outputs))
            got = values_of(answer)
            np.testing.assert_allclose(got, offline(modules["shared"], x), atol=1e-5)

        right = [runner.fast.run for runner in (model.runner, model.alone)]
        model.alone.fast.run = noted("alone", right[1], wait=False)
        model.runner.fast.run = noted("shared", right[0], wait=True)
        ask((3, ()))
        assert ran == [("alone", 2)]
        # More rows than a batch has are parts that come together: they wait for each other in two threads.
        ask((16, ()))
        assert ran[1:] == [("shared", 1)] * 2
        model.runner.fast.run, model.alone.fast.run = right
        layer = f"layer:{next(layer.path for layer in model.manifest.layers if layer.available)}"
        with ThreadPoolExecutor(32) as pool:
            list(pool.map(ask, [(1 + at % 5, ("output", layer) if at % 3 == 0 else ()) for at in range(320)]))
