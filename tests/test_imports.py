"""Which package may import which, read from the source, and what importing the client costs, measured."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Ours that each package may import beside itself.
ALLOWED = {"proto": set(), "client": {"proto"}, "models": {"proto"}, "server": {"proto", "models"}}
HEAVY = {"torch", "onnxruntime", "onnx", "pydantic", "pydantic_settings", "PIL", "rich", "starlette", "uvicorn"}
# Never, not even inside a function: `pip install layercast` has none of them.
NEVER = {"client": {"torch", "onnxruntime", "onnx"}, "proto": {"torch", "onnxruntime", "PIL"}}
# The one door through which the server's package reaches the command line.
EXCEPTIONS = {("server/__main__.py", "client")}
SOURCES = [*ALLOWED, "tests", "benchmarks", "scripts", "deploy", "examples"]


def imported(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """Line and absolute name of everything that is imported; `module` is the dotted name of the file itself."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = module.split(".")
            parents = parents[: len(parents) - node.level + is_package] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            # `from layercast import server` names a package in the second half.
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("import_module", "importlib.import_module"):
            # The command table is the only place that may hold modules by name, and it holds them as data.
            yield from ((node.lineno, value.value) for value in node.args if isinstance(value, ast.Constant))


def violations(path: str, source: str) -> list[str]:
    """What is wrong with the imports of one file; `path` is relative to the root."""
    package = path.split("/", 1)[0]
    module = "layercast." + path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    found = []
    for line, name in imported(ast.parse(source), module, path.endswith("/__init__.py")):
        top, *rest = name.split(".")
        target = rest[0] if rest else ""
        wrong = top in ALLOWED or top in NEVER.get(package, ())
        if top == "layercast" and package in ALLOWED and (path, target) not in EXCEPTIONS:
            wrong = target not in ALLOWED[package] | {package}
        if wrong:
            found.append(f"{path}:{line}: must not import {name}")
    return found


def files() -> list[Path]:
    return sorted(path for folder in SOURCES for path in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    assert violations(path.relative_to(ROOT).as_posix(), path.read_text()) == []


def test_all_four_packages_are_walked() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in files()} >= set(ALLOWED)


BAD = [
    ("client/a.py", "from layercast.server import batcher"),
    ("client/a.py", "from layercast import server"),
    ("client/a.py", "from layercast.models.manifest import Manifest"),
    ("client/a.py", "def late():\n    import torch.nn"),
    ("client/a.py", "import onnxruntime as ort"),
    ("client/commands/a.py", "from ...server.settings import Settings"),
    ("client/__init__.py", "from ..server import settings"),
    ("client/a.py", "import importlib\nimportlib.import_module('layercast.server.batcher')"),
    ("models/a.py", "import layercast.server.batcher"),
    ("models/a.py", "from layercast.client import Client"),
    ("models/layers/a.py", "from ...client import Client"),
    ("proto/a.py", "from layercast.models import registry"),
    ("proto/a.py", "import layercast.client"),
    ("server/a.py", "from layercast.client import Client"),
    ("server/a.py", "from layercast import client"),
    ("server/commands/__main__.py", "from layercast.client.main import main"),
    ("server/a.py", "from server.batcher import Batcher"),
    ("tests/a.py", "import models"),
    ("tests/a.py", "from proto.codec import decode"),
]
GOOD = [
    ("client/a.py", "from layercast.proto.codec import decode_inputs\nimport grpc"),
    ("client/a.py", "from . import errors\nfrom .commands import predict"),
    ("client/__init__.py", "from .client import Client"),
    ("client/commands/a.py", "from ..client import Client"),
    ("client/main.py", "COMMANDS = {'serve': ('start', 'layercast.server.commands.serve')}"),
    ("models/a.py", "import torch\nfrom layercast.proto import codec"),
    ("server/a.py", "from layercast.models.manifest import Manifest\nimport torch"),
    ("server/__main__.py", "from layercast.client.main import main"),
    ("tests/a.py", "from layercast.server import batcher\nimport client_helpers, torch"),
]


@pytest.mark.parametrize(("path", "source"), BAD)
def test_a_wrong_import_is_caught(path: str, source: str) -> None:
    assert len(violations(path, source)) == 1


@pytest.mark.parametrize(("path", "source"), GOOD)
def test_a_right_import_is_let_through(path: str, source: str) -> None:
    assert violations(path, source) == []


@pytest.mark.parametrize("module", ["layercast.client", "layercast.client.main", "layercast.proto.messages"])
def test_the_client_loads_nothing_heavy(module: str) -> None:
    code = f"import {module}, sys; print(*sorted({HEAVY!r} & {{*sys.modules}}))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""
