"""Fuzz one target: `python -m fuzz TARGET [libFuzzer options]`. Starts from messages that decode."""

import sys
import tempfile
from pathlib import Path

import atheris

# Before the decoders are imported, so that every branch in them is seen.
with atheris.instrument_imports(include=["layercast.proto"]):
    from fuzz.targets import TARGETS, seeds


def main() -> None:
    """Run the target named first on the command line; libFuzzer exits with 77 at a crash."""
    name = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    if name not in TARGETS:
        sys.exit(f"fuzz: name a target: {', '.join(TARGETS)}")
    with tempfile.TemporaryDirectory() as corpus:
        for number, message in enumerate(seeds()[name]):
            (Path(corpus) / str(number)).write_bytes(message)
        atheris.Setup([sys.argv[0], *sys.argv[1:], corpus], TARGETS[name])
        atheris.Fuzz()


if __name__ == "__main__":
    main()
