"""The channel arguments that server and clients set. The core ignores one that it does not know, without a word."""

import re
from pathlib import Path

import pytest
from grpc._cython import cygrpc

ROOT = Path(__file__).parent.parent
SOURCES = [path for folder in ("client", "models", "server", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
OPTIONS = {name for path in SOURCES for name in re.findall(r'\("(grpc\.[\w.]+)", ', path.read_text("utf-8"))}
CORE = Path(cygrpc.__file__).read_bytes()


def known(option: str) -> bool:
    # Texts may share their end with a longer one, not their beginning with the text before.
    return option.encode() + b"\0" in CORE


def test_the_options_are_found():
    assert {"grpc.so_reuseport", "grpc.http2.min_ping_interval_without_data_ms"} <= OPTIONS


@pytest.mark.parametrize("option", sorted(OPTIONS))
def test_the_core_knows_the_option(option):
    assert known(option)


def test_an_option_that_it_does_not_know_is_found_out():
    assert not known("grpc.http2.min_recv_ping_interval_without_data_ms")
