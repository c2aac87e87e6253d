"""A real server on one small model that can be held inside its forward, and the counts that the server reports."""

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from google.rpc.status_pb2 import Status
from serving import Running, running
from test_server_inference import request, wait_until
from test_server_operations import get, samples, value

from layercast.proto.rpc import INFERENCE


@contextmanager
def serving_shared(repository: Path, tmp_path: Path, settings: str = "", **given: Any) -> Iterator[Running]:
    """A server on the model `shared` alone, with `settings` in its own file."""
    shutil.copytree(repository / "shared", tmp_path / "shared")
    (tmp_path / "shared" / "layercast.toml").write_text(settings)
    with running(tmp_path, **{"engine": "eager", **given}) as server:
        yield server


class HeldModel:
    """The model `shared` of a server: held and let go, with what its forwards were given."""

    def __init__(self, server: Running) -> None:
        self.server = server
        self.model = server.server.repository.find("shared", "")
        self.batches: list[int] = []
        self.first: list[float] = []
        self.entered, self.leave = threading.Event(), threading.Event()
        self.leave.set()
        for runner in self.model.loaded.runners:
            runner.fast.run = self._watched(runner.fast.run)

    def _watched(self, run: Any) -> Any:
        def watched(inputs: Any) -> Any:
            self.batches.append(len(inputs["x"]))
            self.first += [float(value) for value in inputs["x"][:, 0]]
            self.entered.set()
            assert self.leave.wait(30)
            return run(inputs)

        return watched

    def ask(self, *firsts: float, channel: grpc.Channel | None = None, within: float = 30, **parameters: int) -> Any:
        """Send a row for each of `firsts`, its first value, and return the call."""
        x = np.zeros((len(firsts), 10), "f4")
        x[:, 0] = firsts
        message = request("shared", x)
        for name, number in parameters.items():
            message.parameters[name].int64_param = number
        method = INFERENCE["ModelInfer"]
        stub = (channel or self.server.channel).unary_unary(
            method.path, method.request.SerializeToString, method.response.FromString
        )
        return stub.future(message, timeout=within)

    def waits(self, rows: int) -> None:
        wait_until(self.server, lambda: self.model.batcher.queued_rows == rows)

    def occupy(self) -> Any:
        """Let a forward begin that stays until `leave` is set."""
        self.leave.clear()
        self.entered.clear()
        call = self.ask(-1)
        assert self.entered.wait(10)
        return call

    def hold(self) -> None:
        self.server.on_loop(self.model.batcher.hold)

    def release(self) -> None:
        self.server.on_loop(self.model.batcher.release)

    def metric(self, name: str, **labels: str) -> float:
        found = samples(get(self.server.metrics))
        return value(found, name, model="shared", version="1", **labels)


def failure(call: Any) -> grpc.RpcError:
    error = call.exception(timeout=30)
    assert isinstance(error, grpc.RpcError)
    return error


def details(error: grpc.RpcError, kind: Any) -> Any:
    status = Status.FromString(dict(error.trailing_metadata())["grpc-status-details-bin"])
    unpacked = kind()
    assert any(detail.Unpack(unpacked) for detail in status.details)
    return unpacked
