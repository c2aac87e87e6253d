"""What one request costs in Python: the processor time from its bytes to the bytes of its answer.

Runs in one process, with no network: serialised ModelInfer requests are begun in one pass of the event loop, as many at
a time as asked, and each is followed by another once it is answered. Or they go through the RPC's handler, as grpc.aio
calls it: a task for each. The model is a real artefact, but its engine is replaced by one that does next to nothing, so
that what is left is the server's own: parse, find, check, queue, gather, hand over, answer, serialise, count.
"""

import argparse
import asyncio
import cProfile
import pstats
import tempfile
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import uvloop

from layercast.models import registry
from layercast.models.export.writer import export_artefact
from layercast.proto.messages import ModelInferRequest, ModelInferResponse
from layercast.proto.rpc import INFERENCE, INFERENCE_SERVICE
from layercast.server.metrics import Metrics
from layercast.server.model import ServedModel
from layercast.server.repository import Repository
from layercast.server.service.answering import Answering
from layercast.server.service.inference import InferenceService
from layercast.server.settings import read
from layercast.server.transport.calls import UnaryRpc
from layercast.server.transport.counted import Counted
from layercast.server.transport.short_call import Begin
from layercast.server.transport.status import Reply


def main() -> None:
    """Measure and print microseconds of processor time a request."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=5000, help="of each run")
    parser.add_argument("--runs", type=int, default=5, help="of which the best counts")
    parser.add_argument("--concurrency", type=int, nargs="*", default=[1, 16, 64])
    parser.add_argument("--engine", choices=("none", "real"), default="none", help="what runs the rows")
    parser.add_argument("--through", choices=("begin", "handler"), default="begin", help="the way into the server")
    parser.add_argument("--repository", type=Path, help="where the artefact is kept (default: a temporary folder)")
    parser.add_argument("--profile", action="store_true", help="also print where the time goes at the last concurrency")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = args.repository or Path(folder)
        if not (root / "mnist").is_dir():
            _export(root)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_measure(root, args))


def _export(root: Path) -> None:
    card = {
        "name": "mnist", "architecture": "MNISTClassifier", "arguments": {},
        "inputs": [{"name": "image", "datatype": "FP32", "shape": [-1, 1, 28, 28]}],
        "outputs": [{"name": "logits", "datatype": "FP32", "shape": [-1, 10]}],
    }  # fmt: skip
    export_artefact(registry.build("MNISTClassifier").eval(), card, root / "mnist" / "1", programs=["onnx"])


class _Context:
    """What the handler asks of a call, and no more."""

    def __init__(self, seconds: float | None = None) -> None:
        self._seconds = seconds

    def time_remaining(self) -> float | None:
        return self._seconds

    def peer(self) -> str:
        return "ipv4:127.0.0.1:1"

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.UNKNOWN

    async def abort(self, code: grpc.StatusCode, message: str, trailers: object) -> None:
        raise grpc.aio.AbortError


async def _measure(root: Path, args: argparse.Namespace) -> None:
    front_end = "direct" if args.through == "begin" else "grpcio"
    options: dict[str, Any] = {"engine": "onnx", "max_delay_ms": 0, "front_end": front_end}
    metrics = Metrics()
    repository = Repository(read({"repository": root, **options}), metrics, 1)
    await repository.load_all(root)
    model = repository.find("mnist", "")
    most = max((rows for steps in model.loaded.inline.rows for rows, least in steps if not least), default=0)
    print(f"batches of up to {most} rows run on the event loop")
    if args.engine == "none":
        _replace_engine(model)
    service = InferenceService(Answering(repository, metrics, 64 << 20))
    counted = Counted(INFERENCE_SERVICE, "ModelInfer", metrics)
    rpc = UnaryRpc(INFERENCE["ModelInfer"], service.model_infer, counted, service.begin_model_infer)
    run = partial(_begun, rpc.begin) if args.through == "begin" else partial(_handled, rpc.handler().unary_unary)
    for concurrency in args.concurrency:
        for name, seconds in (("no deadline", None), ("deadline", 10.0)):
            best = min([await run(seconds, args.requests, concurrency) for _ in range(args.runs)])
            print(f"c={concurrency:<3} {name:<12} {best[0]:6.1f} us CPU, {best[1]:6.1f} us wall a request")
    profile = cProfile.Profile()
    if args.profile:
        profile.enable()
        await run(10.0, args.requests, args.concurrency[-1])
        profile.disable()
        pstats.Stats(profile).sort_stats("tottime").print_stats(45)
    await repository.close()


def _replace_engine(model: ServedModel) -> None:
    values = np.zeros((512, 10), "f4")

    def run(inputs: Any) -> dict[str, Any]:
        return {"logits": values[: len(inputs["image"])]}

    for runner in model.loaded.runners:
        runner.fast = SimpleNamespace(name="none", device="cpu", run=run)


def _message() -> bytes:
    image = np.random.default_rng(0).random((1, 1, 28, 28), dtype="f4")
    message = ModelInferRequest(model_name="mnist", id="7", raw_input_contents=[image.tobytes()])
    message.inputs.add(name="image", datatype="FP32", shape=image.shape)
    return message.SerializeToString()


def _check(content: bytes) -> None:
    answer = ModelInferResponse.FromString(content)
    assert answer.outputs[0].shape == [1, 10]
    assert answer.id == "7"


async def _handled(handle: Any, seconds: float | None, requests: int, concurrency: int) -> tuple[float, float]:
    raw, context = _message(), _Context(seconds)
    _check(await handle(raw, context))

    async def ask() -> None:
        # As grpc.aio does: a task of its own for every call.
        for _ in range(requests // concurrency):
            await asyncio.ensure_future(handle(raw, context))

    wall, cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*(ask() for _ in range(concurrency)))
    done = requests // concurrency * concurrency
    return (time.process_time() - cpu) / done * 1e6, (time.perf_counter() - wall) / done * 1e6


async def _begun(begin: Begin, seconds: float | None, requests: int, concurrency: int) -> tuple[float, float]:
    raw, loop, over = _message(), asyncio.get_running_loop(), asyncio.Event()
    due = None if seconds is None else loop.time() + seconds
    left, waiting, answered = requests, concurrency, 0

    def start() -> None:
        nonlocal left, waiting
        many, waiting = min(waiting, left), 0
        left -= many
        for _ in range(many):
            begin(raw, due, "ipv4:127.0.0.1:1", ended)

    def ended(content: bytes | None, failed: Reply | None) -> None:
        nonlocal waiting, answered
        assert content is not None, failed
        answered += 1
        if answered == requests:
            _check(content)
            over.set()
        if not waiting:
            loop.call_soon(start)
        waiting += 1

    wall, cpu = time.perf_counter(), time.process_time()
    start()
    await over.wait()
    return (time.process_time() - cpu) / requests * 1e6, (time.perf_counter() - wall) / requests * 1e6


if __name__ == "__main__":
    main()
