"""The fuzz targets: good messages and mangled ones pass, and a decoder that breaks in its own way is seen."""

import fuzz.targets
import pytest
from fuzz.targets import TARGETS, seeds
from hypothesis import given, settings
from hypothesis import strategies as st


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_starts_from_messages_that_decode(target, monkeypatch):
    def refuse(*args: object) -> None:
        raise AssertionError("a seed was refused")

    monkeypatch.setattr(fuzz.targets.CodecError, "__str__", refuse)
    for message in seeds()[target]:
        TARGETS[target](message)


@pytest.mark.parametrize("target", TARGETS)
@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_mangled_messages_are_decoded_or_refused(target, data):
    message = bytearray(data.draw(st.sampled_from(seeds()[target])))
    for at in data.draw(st.lists(st.integers(0, len(message) - 1), max_size=4)):
        message[at] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(message)))
    TARGETS[target](bytes(message[:cut]) + data.draw(st.binary(max_size=8)))


@pytest.mark.parametrize(("target", "decoder"), [("infer", "decode_inputs"), ("extract", "decode_named")])
def test_a_decoder_that_raises_anything_else_is_seen(target, decoder, monkeypatch):
    def broken(*args: object) -> None:
        raise IndexError("past the end")

    monkeypatch.setattr(fuzz.targets, decoder, broken)
    with pytest.raises(IndexError):
        TARGETS[target](seeds()[target][0])
