"""The wheel, built without the network from a copy of the tree, holds everything that the packages need."""

import hashlib
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parent.parent
PACKAGES = ("proto", "server", "models", "client")
APACHE_2_0 = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"
PLATFORMS = [
    {"sys_platform": "linux", "platform_machine": "x86_64"},
    {"sys_platform": "linux", "platform_machine": "aarch64"},
    {"sys_platform": "darwin", "platform_machine": "arm64"},
    {"sys_platform": "win32", "platform_machine": "AMD64"},
]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    source = tmp_path_factory.mktemp("source")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    result = subprocess.run([*command, "-w", source / "dist", source], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    (path,) = (source / "dist").glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> Message:
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    return Parser().parsestr(wheel.read(name).decode())


@pytest.fixture(scope="module")
def requirements(metadata: Message) -> list[Requirement]:
    return [Requirement(line) for line in metadata.get_all("Requires-Dist", [])]


def source_files() -> set[str]:
    """Every file below the four folders, under the name that it must have in the wheel."""
    paths = [path for package in PACKAGES for path in (ROOT / package).rglob("*")]
    return {
        f"layercast/{path.relative_to(ROOT).as_posix()}"
        for path in paths
        if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith(".")
    }


def test_every_file_of_the_four_folders_is_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    assert source_files() - set(wheel.namelist()) == set()


def test_nothing_else_is_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    strangers = {name for name in wheel.namelist() if ".dist-info/" not in name} - source_files()
    assert strangers == set()


def test_every_folder_with_an_init_is_listed() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = [path.parent.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("__init__.py")]
    assert listed == {".".join(["layercast", *path.parts]) for path in found}


def test_every_package_says_that_it_is_typed(wheel: zipfile.ZipFile) -> None:
    assert {f"layercast/{package}/py.typed" for package in PACKAGES} <= set(wheel.namelist())


def test_the_descriptors_and_their_types_are_shipped(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    assert "layercast/proto/descriptors.binpb" in names
    assert any(name.startswith("layercast/proto/") and name.endswith(".pyi") for name in names)


def test_the_licence_is_said_and_shipped(wheel: zipfile.ZipFile, metadata: Message) -> None:
    assert metadata["License-Expression"] == "Apache-2.0"
    assert set(metadata.get_all("License-File", [])) == {"LICENSE", "NOTICE"}
    texts = {Path(name).name: wheel.read(name).decode() for name in wheel.namelist() if "/licenses/" in name}
    # The text as the foundation publishes it, byte for byte: a changed licence would be another licence.
    assert hashlib.sha256(texts["LICENSE"].encode()).hexdigest() == APACHE_2_0
    assert "Copyright 2026 The Layercast authors" in texts["NOTICE"]


def test_a_plain_install_is_three_packages(requirements: list[Requirement]) -> None:
    base = {requirement.name for requirement in requirements if "extra ==" not in str(requirement.marker or "")}
    assert base == {"grpcio", "numpy", "protobuf"}


@pytest.mark.parametrize("platform", PLATFORMS, ids=lambda platform: "-".join(platform.values()))
@pytest.mark.parametrize("extra", ["server", "export", "images", "dev"])
def test_at_most_one_onnxruntime_is_asked_for(
    requirements: list[Requirement], platform: dict[str, str], extra: str
) -> None:
    wanted = [
        requirement.name
        for requirement in requirements
        if requirement.name.startswith("onnxruntime")
        and (requirement.marker is None or requirement.marker.evaluate({**platform, "extra": extra}))
    ]
    if extra == "server":
        on_linux = platform == PLATFORMS[0]
        assert wanted == ["onnxruntime-gpu" if on_linux else "onnxruntime"]
    else:
        assert wanted == []


def test_the_command_and_the_python_range(wheel: zipfile.ZipFile, metadata: Message) -> None:
    (name,) = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
    assert "layercast = layercast.client.main:main" in wheel.read(name).decode()
    assert SpecifierSet(metadata["Requires-Python"]) == SpecifierSet(">=3.11,<3.14")


def test_the_tested_torch_is_within_the_declared_range(requirements: list[Requirement]) -> None:
    lines = (ROOT / "constraints" / "cpu.txt").read_text().splitlines()
    (pin,) = [Requirement(line) for line in lines if line and not line.startswith("#")]
    (declared,) = [requirement for requirement in requirements if requirement.name == "torch"]
    (release,) = pin.specifier
    assert pin.name == "torch"
    assert declared.specifier.contains(release.version)


@pytest.fixture(scope="module")
def installed(wheel: zipfile.ZipFile, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    wheel.extractall(folder)  # which is all that installing a pure wheel does, but for the script
    return folder


@pytest.mark.parametrize("module", ["client", "proto.messages", "proto.codec", "models.manifest", "server.settings"])
def test_the_wheel_works_away_from_the_checkout(installed: Path, module: str) -> None:
    code = f"import layercast.{module} as module; print(module.__file__)"
    environ = {**os.environ, "PYTHONPATH": str(installed)}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=installed, env=environ, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()).is_relative_to(installed)


@pytest.mark.parametrize(("arguments", "code"), [(["--help"], 0), (["doctor", "--help"], 0), (["no-such-verb"], 2)])
def test_the_command_of_the_wheel_runs(installed: Path, arguments: list[str], code: int) -> None:
    environ = {**os.environ, "PYTHONPATH": str(installed)}
    command = [sys.executable, "-m", "layercast.server", *arguments]
    result = subprocess.run(command, cwd=installed, env=environ, capture_output=True, text=True, check=False)
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
