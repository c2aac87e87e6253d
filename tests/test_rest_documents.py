"""Tensors in JSON: every datatype there and back, exactly, and what does not fit."""

import json

import numpy as np
import pytest

from layercast.proto.codec import CodecError, Place
from layercast.server.errors import InvalidArgument
from layercast.server.rest.documents import array_from, listed

PLACE = Place("input 'x'", "inputs[0]", "inputs[0].data")
EXTREMES = {
    "BOOL": np.array([True, False]),
    "FP32": np.array([np.finfo("f4").max, np.finfo("f4").tiny, 1e-45, -0.0, 0.1], "f4"),
    "FP64": np.array([np.finfo("f8").max, 5e-324, -0.0, 0.1, 2.0**53 + 2], "f8"),
    **{
        f"{'U' * (kind == 'u')}INT{8 * size}": np.array([np.iinfo(f"{kind}{size}").min, np.iinfo(f"{kind}{size}").max, 1], f"{kind}{size}")
        for kind in "iu"
        for size in (1, 2, 4, 8)
    },
}  # fmt: skip


@pytest.mark.parametrize("datatype", EXTREMES)
def test_every_value_of_every_datatype_survives(datatype):
    values = EXTREMES[datatype]
    text = b"".join(listed(values, datatype, "x"))
    # The oracle is the plain JSON of Python's own numbers.
    assert json.loads(text) == values.tolist()
    back = array_from(json.loads(text), datatype, [len(values)], PLACE)
    assert (back.dtype, back.tobytes()) == (values.dtype, values.tobytes())


def test_texts_survive_also_what_json_escapes():
    texts = ["", "é", '"\\\n\0', "\U0001f600"]
    back = array_from(json.loads(b"".join(listed(np.array([t.encode() for t in texts], object), "BYTES", "x"))), "BYTES", [2, 2], PLACE)  # fmt: skip
    assert back.tolist() == [texts[:2], texts[2:]]


def test_bytes_that_are_no_text_are_refused():
    with pytest.raises(InvalidArgument, match="not UTF-8 text, which JSON can't carry; ask for binary_data"):
        list(listed(np.array([b"\xff"], object), "BYTES", "x"))


@pytest.mark.parametrize(
    ("datatype", "value", "text"),
    [
        ("UINT8", 256, "does not fit into UINT8"), ("UINT8", -1, "does not fit into UINT8"),
        ("INT8", -129, "does not fit into INT8"), ("INT16", 2**15, "does not fit"), ("INT32", 2**31, "does not fit"),
        ("INT64", 2**63, "does not fit"), ("UINT64", 2**64, "does not fit"), ("UINT64", -1, "does not fit"),
        ("INT32", 1.0, "want a whole number for INT32, got a number"), ("INT32", True, "want a whole number"),
        ("BOOL", 1, "want true or false for BOOL"), ("BYTES", 1, "want a string for BYTES"),
        ("FP64", "1", "want a number"), ("FP64", {}, "got an object"), ("FP16", 1.0, "FP16 has no form in JSON"),
        ("BF16", 1.0, "BF16 has no form in JSON"), ("INT9", 1, "datatype 'INT9' is unknown"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(datatype, value, text):
    with pytest.raises(CodecError, match=text) as raised:
        array_from([value], datatype, [1], PLACE)
    assert raised.value.field.startswith("inputs[0]")


def test_pieces_of_a_long_tensor_join_without_a_seam():
    values = np.arange(200_001, dtype="i8").reshape(3, 66_667)
    text = b"".join(listed(values, "INT64", "x"))
    assert json.loads(text) == values.ravel().tolist()
    np.testing.assert_array_equal(array_from(values.tolist(), "INT64", [3, 66_667], PLACE), values)
    with pytest.raises(CodecError, match="element 150000: want a whole number"):
        array_from([0] * 150_000 + [0.5], "INT64", [150_001], PLACE)


@pytest.mark.parametrize("shape", [[0], [0, 3], [2, 0]])
def test_no_values_are_a_tensor_too(shape):
    assert array_from([], "FP32", shape, PLACE).shape == tuple(shape)


def test_a_scalar_has_one_value():
    assert array_from([4], "INT32", [], PLACE).shape == ()
