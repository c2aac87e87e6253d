"""Fixtures that many tests share; the expensive ones are made once a session."""

import functools
import gc
import importlib
import os
import shutil
import signal
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import compiled_kernels
import grpc
import pytest
import torch
from direct import peers_of, serving_directly
from h2_peer import Peer
from one_run import made_once
from serving import Running, running
from torch import nn

from layercast.models import registry
from layercast.models.export.writer import export_artefact
from layercast.proto.rpc import FEATURES
from layercast.server import compiled

# A shell that starts the tests in the background makes them, and every process they start, ignore Ctrl-C, which some
# of them send. A handler of our own is back to the default in a child.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Leave what hundreds of modules hold to the end of the process: going through it takes half a second each time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.collect()
        gc.freeze()


_torchs_export = torch.onnx.export


@functools.cache
def _keep_operators() -> None:
    """Let torch make its table of operators once: each of hundreds of small exports would take a quarter longer."""
    table = importlib.import_module("torch.onnx._internal.exporter._registration").ONNXRegistry
    table.from_torchlib = staticmethod(functools.cache(table.from_torchlib))


def _export(*args: Any, **options: Any) -> Any:
    """Stand for torch's own, which loads all that it needs only when it is called."""
    _keep_operators()
    return _torchs_export(*args, **options)


torch.onnx.export = _export


CARDS: dict[str, dict[str, Any]] = {
    "mnist": {
        "architecture": "MNISTClassifier",
        "inputs": [{"name": "image", "datatype": "FP32", "shape": [-1, 1, 28, 28], "range": [0, 1]}],
        "labels": [str(digit) for digit in range(10)],
        "preprocessing": {
            "kind": "image", "mode": "L", "width": 28, "height": 28, "scale": 1 / 255, "layout": "CHW", "background": "dark",
        },
    },
    "resnet": {
        "architecture": "ResNetLike",
        "inputs": [{"name": "image", "datatype": "FP32", "shape": [-1, 3, 32, 32]}],
        "labels": [f"class {number}" for number in range(10)],
        "preprocessing": {"kind": "image", "mode": "RGB", "width": 32, "height": 32, "scale": 1 / 255, "layout": "CHW"},
    },
    "transformer": {
        "architecture": "TransformerEncoder",
        "arguments": {"max_length": 32, "embed_dim": 16, "num_heads": 2, "ff_dim": 32, "num_blocks": 2},
        "inputs": [
            {"name": "tokens", "datatype": "INT64", "shape": [-1, -1], "range": [0, 256], "pad": 256, "max_length": 32}
        ],
        "labels": ["ham", "spam"],
        "preprocessing": {"kind": "text", "encoding": "utf-8", "pad": 256, "max_length": 32, "overlong": "cut"},
    },
    "shared": {
        "architecture": "SharedWeights",
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 10]}],
    },
}  # fmt: skip
OUTPUTS = {"mnist": ("logits", 10), "resnet": ("logits", 10), "transformer": ("logits", 2), "shared": ("output", 10)}


def card_of(name: str) -> dict[str, Any]:
    """Return the card of a test model."""
    output, size = OUTPUTS[name]
    outputs = [{"name": output, "datatype": "FP32", "shape": [-1, size]}]
    return {"name": name, "arguments": {}, "outputs": outputs, **CARDS[name]}


@contextmanager
def in_one_thread() -> Iterator[None]:
    """Compute in one thread: so little work is only slowed down by threads that wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Let the test compute in one thread."""
    with in_one_thread():
        yield


@pytest.fixture(scope="session")
def modules() -> dict[str, nn.Module]:
    """Untrained models in eval mode, with running statistics that are not the identity: the oracles."""
    torch.manual_seed(0)
    made = {}
    for name, card in CARDS.items():
        module = registry.build(card["architecture"], **card.get("arguments", {}))
        for part in module.modules():
            if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
                part.running_mean.uniform_(-0.2, 0.2)
                part.running_var.uniform_(0.5, 1.5)
        made[name] = module.eval()
    return made


@pytest.fixture(scope="session")
def repository(modules: dict[str, nn.Module]) -> Path:
    """A repository of the test models, version 1 each, with every program."""

    def export(root: Path) -> None:
        with in_one_thread():
            for name, module in modules.items():
                export_artefact(module, card_of(name), root / name / "1")

    return made_once("repository", export)


@pytest.fixture(scope="session")
def only_mnist(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of that test model alone, for servers that are asked for no other."""
    root = tmp_path_factory.mktemp("only")
    shutil.copytree(repository / "mnist", root / "mnist")
    return root


@pytest.fixture(scope="session")
def one_model(modules: dict[str, nn.Module], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of one small model, for tests that start servers of their own."""
    root = tmp_path_factory.mktemp("one")
    export_artefact(modules["shared"], card_of("shared"), root / "shared" / "1", programs=("torchscript",))
    return root


@pytest.fixture(scope="session")
def served(repository: Path) -> Iterator[Running]:
    """A server on that repository, shared by tests that leave it as they found it; batches hold 16 rows."""
    with running(repository, max_batch=16) as server:
        yield server


@pytest.fixture
def slow_reader(served: Running) -> Iterator[Any]:
    """Streams on a connection of its own that holds next to nothing of what nobody has read."""
    options = [("grpc.max_receive_message_length", -1), ("grpc.http2.bdp_probe", 0),
               ("grpc.use_local_subchannel_pool", 1)]  # fmt: skip
    method = FEATURES["ExtractStream"]
    with grpc.insecure_channel(served.url, options) as channel:
        stub = channel.unary_stream(method.path, method.request.SerializeToString, method.response.FromString)
        yield lambda message, timeout=30.0: stub(message, timeout=timeout)


@pytest.fixture(scope="session")
def direct() -> Iterator[Running]:
    """A server of numpy models whose front end is `direct`, shared by tests that leave it as they found it."""
    with serving_directly() as server:
        yield server


@pytest.fixture
def connect(direct: Running) -> Iterator[Callable[..., Peer]]:
    """What opens raw connections to that server; it must serve others as ever when the test has ended."""
    with peers_of(direct) as connect:
        yield connect


@pytest.fixture(scope="session")
def kernels_folder() -> Path:
    """Where the kernels of engines are compiled, without the modules: the sources run."""
    return made_once("kernels", compiled_kernels.make)


@pytest.fixture
def kernels_here(kernels_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let engines of this process find those kernels during the test."""
    monkeypatch.setattr(compiled, "_looked_in", [])
    compiled.look_in(kernels_folder)


@pytest.fixture(scope="session")
def data_directory() -> Path:
    """The folder with the real data sets; tests that need it are skipped where it is absent."""
    given = os.environ.get("LAYERCAST_DATA")
    directory = Path(given) if given else Path(__file__).parents[2] / "shared" / "data"
    if not (directory / "mnist").is_dir():
        pytest.skip("needs the data sets; name their folder in LAYERCAST_DATA")
    return directory


@pytest.fixture(scope="session")
def stock_python() -> str:
    """The interpreter that has tritonclient; `make test` makes it."""
    return _apart("tritonclient")


@pytest.fixture(scope="session")
def kserve_python() -> str:
    """The interpreter that has KServe's client; `make test` makes it."""
    return _apart("kserve")


def _apart(name: str) -> str:
    python = Path(__file__).parents[1] / f".venv-{name}" / "bin" / "python"
    if not python.is_file():
        pytest.skip(f"needs .venv-{name}; scripts/setup.sh dev makes it")
    return str(python)
