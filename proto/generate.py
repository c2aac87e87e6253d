"""Compile the .proto files: `python -m layercast.proto.generate [--check DIR]`. Needs `pip install 'layercast[dev]'`.

Two kinds of file come out, and both are committed:

* `descriptors.binpb`, the descriptors of all three files, which `messages.py` turns into classes at import;
* `*_pb2.pyi`, what type checkers read about those classes. No `_pb2.py` stands behind them: such modules would put the
  `inference` package into protobuf's default pool, where it clashes with any other Open Inference client.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from google.protobuf.descriptor_pb2 import FileDescriptorSet

HERE = Path(__file__).parent
SOURCES = ("inference/model_config.proto", "inference/service.proto", "layercast/v1/features.proto")
DESCRIPTORS = "descriptors.binpb"
# protoc's own stubs are not complete enough for mypy --strict; what they do say is right.
STUB_HEADER = (
    b'# Written by layercast.proto.generate; do not edit.\n# mypy: disable-error-code="type-arg,no-untyped-def"\n'
)


def compile_into(output: Path) -> list[Path]:
    """Write `descriptors.binpb` and the stubs into the directory `output`; return what was written."""
    descriptors = output / DESCRIPTORS
    _protoc(f"-I{HERE}", "--include_imports", f"--descriptor_set_out={descriptors}", *SOURCES)
    files = FileDescriptorSet.FromString(descriptors.read_bytes())
    return [descriptors, *_write_stubs(files, output)]


def differences(directory: Path) -> list[str]:
    """Names of generated files in `directory` that are not byte for byte what the sources give."""
    with tempfile.TemporaryDirectory() as scratch:
        fresh = compile_into(Path(scratch))
        return [path.name for path in fresh if not _same(path, directory / path.name)]


def _write_stubs(files: FileDescriptorSet, output: Path) -> list[Path]:
    # protoc derives the imports inside a stub from file names. Named as modules of this package, the stubs lie side by
    # side and find each other, while the sources keep the paths that users of other languages compile.
    names = {file.name: f"layercast/proto/{Path(file.name).name}" for file in files.file}
    for file in files.file:
        file.name = names[file.name]
        dependencies = [names[dependency] for dependency in file.dependency]
        del file.dependency[:]
        file.dependency.extend(dependencies)
    with tempfile.TemporaryDirectory() as scratch:
        renamed = Path(scratch, DESCRIPTORS)
        renamed.write_bytes(files.SerializeToString())
        _protoc(f"--descriptor_set_in={renamed}", f"--pyi_out={scratch}", *names.values())
        stubs = sorted(Path(scratch, "layercast/proto").glob("*_pb2.pyi"))
        return [_write(output / stub.name, STUB_HEADER + stub.read_bytes()) for stub in stubs]


def _write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def _protoc(*arguments: str) -> None:
    from grpc_tools import protoc  # type: ignore[import-untyped]

    if protoc.main(["protoc", *arguments]) != 0:
        raise RuntimeError("protoc failed; its own message is above")


def _same(fresh: Path, committed: Path) -> bool:
    return committed.is_file() and committed.read_bytes() == fresh.read_bytes()


def main(argv: list[str] | None = None) -> int:
    """Regenerate in place, or with `--check DIR` compare DIR with the sources and exit with 1 when they differ."""
    parser = argparse.ArgumentParser(prog="python -m layercast.proto.generate", description="Compile the .proto files.")
    parser.add_argument("--check", type=Path, metavar="DIR", help="write nothing; compare DIR with the sources")
    arguments = parser.parse_args(argv)
    if arguments.check is None:
        compile_into(HERE)
        return 0
    stale = differences(arguments.check)
    if stale:
        print(f"out of date: {', '.join(stale)}; run python -m layercast.proto.generate", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
