"""Explanations from a running server against the library on the same weights, and their lane."""

import asyncio
import threading

import grpc
import numpy as np
import pytest
import torch
from test_server_features import extract, hooked
from test_server_inference import INPUTS, offline, request, rows_for, values_of

from layercast.models.explain import METHODS, Explanation, explain
from layercast.proto.messages import ExplainOptions, ExplainRequest
from layercast.server.errors import DeadlineCancelled, DeadlineExceeded, Unavailable
from layercast.server.explaining import MAX_WAITING, ExplainLane

OPTIONS = {
    "integrated-gradients": {"steps": 8, "baseline": 0.25},
    "smoothgrad": {"samples": 3, "noise": 0.1, "seed": 7},
    "occlusion": {"window": [8], "stride": [8], "baseline": 0.5},
}


def message(model, x, method="saliency", targets=(1,), **options):
    asked = ExplainRequest(model_name=model, id="e", method=method, targets=targets, options=ExplainOptions(**options))
    datatype = "INT64" if model == "transformer" else "FP32"
    asked.inputs.add(name=INPUTS[model], datatype=datatype, shape=x.shape, data=x.tobytes())
    return asked


def array(response):
    tensor = response.attributions
    assert tensor.datatype == "FP32"
    return np.frombuffer(tensor.data, "<f4").reshape(tensor.shape)


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("gradcam", "attention-rollout")])
def test_every_method_equals_the_library(served, modules, method):
    x = rows_for("resnet", 2)
    response = served.call("Explain", message("resnet", x, method, [3, 1], **OPTIONS.get(method, {})))
    options = {name: value[0] if isinstance(value, list) else value for name, value in OPTIONS.get(method, {}).items()}
    wanted = explain(modules["resnet"], torch.from_numpy(x.copy()), method, [3, 1], **options)
    np.testing.assert_allclose(array(response), wanted.attributions, atol=1e-5, rtol=1e-4)
    assert (response.id, list(response.targets), response.model_name) == ("e", [3, 1], "resnet")
    assert response.timing.compute_ns > 0
    if method == "integrated-gradients":
        np.testing.assert_allclose(response.delta, wanted.delta, atol=1e-5)
    else:
        assert not response.delta


def test_grad_cam_of_a_chosen_layer_and_the_largest_output(served, modules):
    x = rows_for("resnet", 3)
    response = served.call("Explain", message("resnet", x, "gradcam", (), layer="layer1.1.conv2", upsample=False))
    wanted = explain(modules["resnet"], torch.from_numpy(x.copy()), "gradcam", layer="layer1.1.conv2", upsample=False)
    np.testing.assert_allclose(array(response), wanted.attributions, atol=1e-5, rtol=1e-4)
    assert list(response.targets) == offline(modules["resnet"], x).argmax(1).tolist()


@pytest.mark.parametrize("method", ["saliency", "integrated-gradients", "occlusion", "attention-rollout"])
def test_tokens(served, modules, method):
    x = rows_for("transformer", 2).copy()
    x[1, -2:] = 256
    options = {"baseline": 32} if method in ("integrated-gradients", "occlusion") else {}
    response = served.call("Explain", message("transformer", x, method, **options))
    wanted = explain(modules["transformer"], torch.from_numpy(x), method, 1, **options)
    np.testing.assert_allclose(array(response), wanted.attributions, atol=1e-5, rtol=1e-3)
    assert array(response).shape == x.shape
    assert not array(response)[1, -2:].any()


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        ({"method": "saliensy"}, "unknown method 'saliensy'; nearest: saliency"),
        ({"method": "saliency", "steps": 3}, "method saliency has no option 'steps'"),
        ({"method": "gradcam", "layer": "layer1.1.conv3"}, "no layer matches 'layer1.1.conv3'; nearest: layer1.1.conv"),
        ({"method": "gradcam", "layer": "x" * 300}, "the pattern is longer than 256"),
        ({"targets": [99]}, "target 99 is out of range"),
        ({"targets": [1, 2, 3]}, "one for each of 2 rows"),
        ({"method": "occlusion", "window": [1], "stride": [1], "rows": 70}, "71,680, at most 65,536 may be"),
        ({"method": "smoothgrad", "samples": 2**31 - 1}, "4,294,967,294, at most 65,536 may be"),
        ({"rows": 0}, "no rows"),
    ],
)
def test_what_cannot_be_explained_is_said(served, asked, text):
    rows = rows_for("resnet", asked.pop("rows", 2))
    with pytest.raises(grpc.RpcError, match=text) as caught:
        served.call("Explain", message("resnet", rows, **asked))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_predictions_and_layers_beside_a_long_explanation_are_right_and_not_held_up(served, modules):
    x = rows_for("resnet", 8)
    inside, wanted = hooked(modules["resnet"], x)["layer1"][0], offline(modules["resnet"], x)
    long = served.rpc("Explain").future(message("resnet", x, "smoothgrad", samples=8000), timeout=60)
    try:
        for _ in range(10):
            np.testing.assert_allclose(values_of(served.call("ModelInfer", request("resnet", x))), wanted, atol=1e-4)
            (layer,) = extract(served, "resnet", x, ["layer1"]).layers
            np.testing.assert_allclose(np.frombuffer(layer.data, "<f4").reshape(layer.shape), inside, atol=1e-5)
        assert not long.done()
    finally:
        long.cancel()


def test_a_cancelled_or_late_explanation_makes_room(served):
    x = rows_for("resnet", 8)
    endless = message("resnet", x, "smoothgrad", samples=8000)
    cancelled = served.rpc("Explain").future(endless, timeout=60)
    with pytest.raises(grpc.RpcError) as late:
        served.call("Explain", endless, timeout=0.3)
    assert late.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    cancelled.cancel()
    assert array(served.call("Explain", message("resnet", x[:1]), timeout=20)).shape == (1, 3, 32, 32)


async def test_the_lane_runs_one_at_a_time_in_order_and_refuses_too_many():
    lane, gate, order = ExplainLane(), threading.Event(), []
    found = Explanation(torch.zeros(1), torch.zeros(1))

    def job(number):
        def run(progress):
            order.append(number)
            assert gate.wait(10)
            progress(1, 1)
            return found

        return run

    tasks = [asyncio.create_task(lane.run(job(number))) for number in range(MAX_WAITING + 1)]
    while not order:
        await asyncio.sleep(0)
    with pytest.raises(Unavailable, match=f"{MAX_WAITING} explanations wait already"):
        await lane.run(job(99))
    tasks[3].cancel()
    await asyncio.gather(tasks[3], return_exceptions=True)
    tasks.append(asyncio.create_task(lane.run(job(50))))  # the cancelled one's place
    await asyncio.sleep(0)
    assert order == [0]
    gate.set()
    done = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(done[3], asyncio.CancelledError)
    assert order == [*(number for number in range(MAX_WAITING + 1) if number != 3), 50]
    assert done[0].explanation is found
    assert done[1].queue_ns > 0


async def test_the_lane_stops_an_abandoned_one_after_its_chunk_and_passes_errors_on():
    lane, started, go, stopped = ExplainLane(), threading.Event(), threading.Event(), threading.Event()

    def long(progress):
        started.set()
        assert go.wait(10)
        try:
            progress(1, 2)
        except BaseException:
            stopped.set()
            raise
        raise AssertionError("it went on")

    def broken(progress):
        raise ValueError("no")

    task = asyncio.create_task(lane.run(long))
    await asyncio.to_thread(started.wait, 10)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    go.set()
    with pytest.raises(ValueError, match="no"):
        await lane.run(broken)
    assert stopped.is_set()


@pytest.mark.parametrize("raised", [StopIteration, SystemExit, KeyboardInterrupt, asyncio.CancelledError])
async def test_whatever_a_model_raises_the_lane_goes_on(raised):
    lane, found = ExplainLane(), Explanation(torch.zeros(1), torch.zeros(1))

    def broken(progress):
        raise raised

    with pytest.raises(RuntimeError, match=f"the model raised {raised.__name__}"):
        await asyncio.wait_for(lane.run(broken), 10)
    assert (await asyncio.wait_for(lane.run(lambda progress: found), 10)).explanation is found


async def test_the_lane_tells_a_deadline_from_a_caller_who_leaves():
    lane, go, now = ExplainLane(), threading.Event(), asyncio.get_running_loop().time

    def long(progress):
        assert go.wait(10)
        progress(1, 1)

    with pytest.raises(DeadlineExceeded):
        await lane.run(long, now() + 0.05)
    for deadline, kind in ((now() + 0.01, DeadlineCancelled), (now() + 60, asyncio.CancelledError)):
        task = asyncio.create_task(lane.run(long, deadline))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError) as ended:
            await task
        assert type(ended.value) is kind
    go.set()
