"""The committed descriptors and stubs are what the .proto files give, byte for byte."""

from pathlib import Path

import pytest

import layercast.proto

pytest.importorskip("grpc_tools", reason="grpcio-tools is in the dev extra")

from layercast.proto import generate

COMMITTED = Path(layercast.proto.__file__).parent


def test_committed_files_are_up_to_date(tmp_path: Path) -> None:
    written = generate.compile_into(tmp_path)
    assert {path.name for path in written} == {
        "descriptors.binpb",
        "features_pb2.pyi",
        "model_config_pb2.pyi",
        "service_pb2.pyi",
    }
    for path in written:
        assert (COMMITTED / path.name).read_bytes() == path.read_bytes(), f"{path.name}: run the generator"


def test_check_names_the_file_that_is_stale(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generate.compile_into(tmp_path)
    assert generate.main(["--check", str(tmp_path)]) == 0
    (tmp_path / "service_pb2.pyi").write_text("old")
    (tmp_path / "descriptors.binpb").unlink()
    assert generate.main(["--check", str(tmp_path)]) == 1
    assert "descriptors.binpb, service_pb2.pyi" in capsys.readouterr().err
