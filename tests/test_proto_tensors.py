"""One tensor to bytes and back. Expected bytes come from `struct` and from hand-written bit patterns."""

import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from layercast.proto.tensors import (
    DATATYPES,
    MAX_BYTES_ELEMENTS,
    CodecError,
    Place,
    datatype_of,
    from_bytes,
    quoted,
    tensor_bytes,
)

# struct's letter for each fixed-size datatype and some values that only that width can hold.
NUMBERS = {
    "BOOL": ("?", [True, False, True]),
    "UINT8": ("B", [0, 1, 255]),
    "UINT16": ("H", [0, 258, 2**16 - 1]),
    "UINT32": ("I", [0, 2**31, 2**32 - 1]),
    "UINT64": ("Q", [0, 2**63, 2**64 - 1]),
    "INT8": ("b", [-128, -1, 127]),
    "INT16": ("h", [-(2**15), -1, 2**15 - 1]),
    "INT32": ("i", [-(2**31), -1, 2**31 - 1]),
    "INT64": ("q", [-(2**63), -1, 2**63 - 1]),
    "FP16": ("e", [0.5, -65504.0, 2.0**-24]),
    "FP32": ("f", [0.5, -(2.0**127), 2.0**-149]),
    "FP64": ("d", [0.1, -(2.0**1023), 5e-324]),
}
# A busy machine is slow now and then; that is no finding.
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
FLOATS = {"FP16": "<u2", "FP32": "<u4", "FP64": "<u8"}


@pytest.mark.parametrize("datatype", NUMBERS)
def test_numbers_are_little_endian_and_dense(datatype: str) -> None:
    letter, values = NUMBERS[datatype]
    raw = struct.pack(f"<3{letter}", *values)
    decoded = from_bytes(raw, datatype, [3, 1])
    assert decoded.shape == (3, 1)
    assert decoded.ravel().tolist() == values
    assert datatype_of(decoded.dtype) == datatype
    assert tensor_bytes(decoded, datatype) == raw


@pytest.mark.parametrize("datatype", FLOATS)
def test_special_floats_keep_every_bit(datatype: str) -> None:
    width = np.dtype(FLOATS[datatype]).itemsize * 8
    mantissa = {16: 10, 32: 23, 64: 52}[width]
    infinity = ((1 << (width - 1 - mantissa)) - 1) << mantissa
    sign = 1 << (width - 1)
    # Infinities, quiet and signalling NaNs with payload, -0.0, the smallest denormals.
    bits = [infinity, infinity | sign, infinity | 1, infinity | (1 << (mantissa - 1)) | 5, sign, 1, sign | 1]
    raw = np.array(bits, FLOATS[datatype]).tobytes()
    assert tensor_bytes(from_bytes(raw, datatype, [len(bits)]), datatype) == raw


@pytest.mark.parametrize("datatype", DATATYPES)
def test_zero_rows_and_rank_zero(datatype: str) -> None:
    empty = from_bytes(b"", datatype, [0, 4])
    assert empty.shape == (0, 4)
    assert tensor_bytes(empty, datatype) == b""
    scalar = np.array(b"x" if datatype == "BYTES" else 1, DATATYPES[datatype])
    assert from_bytes(tensor_bytes(scalar, datatype), datatype, []).item() == scalar.item()


def test_decoded_numbers_are_a_read_only_view() -> None:
    raw = bytes(range(16))
    decoded = from_bytes(raw, "FP32", [2, 2])
    assert np.shares_memory(decoded, np.frombuffer(raw, "u1"))
    with pytest.raises(ValueError, match="read-only"):
        decoded[0, 0] = 1
    with pytest.raises(ValueError, match="read-only"):
        from_bytes(b"\x00" * 4, "BYTES", [1])[0] = b"x"


@pytest.mark.parametrize(
    "view",
    [
        np.asfortranarray,
        lambda a: a[::2],
        lambda a: a[:, ::-1],
        lambda a: a.transpose(2, 0, 1),
        lambda a: np.broadcast_to(a[0], (5, *a.shape[1:])),
        lambda a: a.astype(">f4"),
    ],
    ids=["fortran", "sliced", "reversed", "transposed", "broadcast", "big-endian"],
)
@pytest.mark.parametrize("datatype", ["FP32", "BF16"])
def test_bytes_are_those_of_the_logical_array(view, datatype: str) -> None:
    array = view(np.arange(24, dtype="<f4").reshape(4, 2, 3))
    copied = np.array(array.tolist(), "<f4")
    assert from_bytes(tensor_bytes(array, datatype), datatype, array.shape).tolist() == copied.tolist()


@unhurried
@given(hnp.arrays(st.sampled_from([d for n, d in DATATYPES.items() if n != "BYTES"]), hnp.array_shapes(min_side=0)))
def test_any_array_comes_back(array) -> None:
    datatype = datatype_of(array.dtype)
    back = from_bytes(tensor_bytes(array, datatype), datatype, array.shape)
    assert (back.dtype, back.shape, back.tobytes()) == (array.dtype, array.shape, array.tobytes())


@unhurried
@given(hnp.arrays(object, hnp.array_shapes(max_dims=2, min_side=0), elements=st.binary() | st.text("aé\0漢")))
def test_any_bytes_come_back(array) -> None:
    raw = tensor_bytes(array, "BYTES")
    elements = [element.encode() if isinstance(element, str) else element for element in array.ravel().tolist()]
    assert raw == b"".join(struct.pack("<I", len(element)) + element for element in elements)
    back = from_bytes(raw, "BYTES", array.shape)
    assert (back.shape, back.ravel().tolist()) == (array.shape, elements)


# ------------------------------------------------------------------------------------------------------------- BF16


def to_bf16(*values: float) -> list[int]:
    return np.frombuffer(tensor_bytes(np.array(values, "f4"), "BF16"), "<u2").tolist()


def test_bf16_rounds_to_nearest_even() -> None:
    # Steps near 1.0 are 2**-7: exact, below half, a tie going down to even, a tie going up to even, above half.
    assert to_bf16(1.0) == [0x3F80]
    assert to_bf16(1 + 2**-9) == [0x3F80]
    assert to_bf16(1 + 2**-8) == [0x3F80]
    assert to_bf16(1 + 3 * 2**-8) == [0x3F82]
    assert to_bf16(1 + 2**-8 + 2**-20) == [0x3F81]
    assert to_bf16(-1 - 3 * 2**-8, -0.0, np.inf, -np.inf) == [0xBF82, 0x8000, 0x7F80, 0xFF80]
    assert to_bf16(np.finfo("f4").max) == [0x7F80]


def test_a_sum_of_bf16_values_is_the_native_one() -> None:
    one_hundredth = from_bytes(tensor_bytes(np.array([0.01], "f4"), "BF16"), "BF16", [1])
    assert one_hundredth.item() == 0.010009765625
    total = from_bytes(tensor_bytes(one_hundredth + one_hundredth, "BF16"), "BF16", [1])
    assert total.item() == 0.02001953125  # truncation would give 0.019897


def test_every_bf16_pattern_survives() -> None:
    raw = np.arange(2**16, dtype="<u2").tobytes()
    decoded = from_bytes(raw, "BF16", [2**16])
    assert decoded.dtype == np.float32
    assert tensor_bytes(decoded, "BF16") == raw


def test_a_nan_whose_payload_is_cut_off_stays_a_nan() -> None:
    nans = np.array([0x7F800001, 0xFF80FFFF, 0x7FFFFFFF, 0xFFFFFFFF], "<u4").view("<f4")
    assert np.isnan(from_bytes(tensor_bytes(nans, "BF16"), "BF16", [4])).all()


# -------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("raw", "datatype", "shape", "text"),
    [
        (b"\x00" * 20, "FP32", [2, 3], "FP32 of shape [2, 3] takes 24 bytes, got 20"),
        (b"\x00" * 25, "FP32", [2, 3], "got 25"),
        (b"", "FP32", [1], "takes 4 bytes, got 0"),
        (b"\x00" * 8, "FP32", [], "takes 4 bytes, got 8"),
        (b"\x00" * 48, "FP32", [-1, 12], "negative dimension -1"),
        (b"\x00" * 48, "FP32", [-1, -12], "negative dimension -1"),
        (b"", "FP32", [2**32, 2**32], "exceeds 2147483647"),
        (b"", "FP32", [2**62, 4], "exceeds 2147483647"),
        (b"", "FP32", [2**63 - 1], "exceeds 2147483647"),
        (b"", "FP32", [0, 2**31 - 1, 2**31 - 1, 2**31 - 1], "too large"),
        (b"", "UINT8", [2**31 - 1, 2**31 - 1], "too large"),
        (b"", "UINT8", [2**31 - 1], "takes 2147483647 bytes, got 0"),
        (b"", "FP32", [1] * 9, "9 dimensions; at most 8"),
        (b"", "FP32", [1] * 100_000, "100000 dimensions; at most 8"),
        (b"\x02\x01", "BOOL", [2], "value 0 or 1; got 2"),
        (b"", "fp32", [0], "datatype 'fp32' is unknown"),
        (b"", "", [0], "datatype '' is unknown"),
        (b"", "FP8", [0], "use one of BOOL"),
        (b"\x00" * (4 << 20), "BYTES", [1], "4194300 bytes follow the last of 1"),
        (b"\xff\xff\xff\xffA", "BYTES", [1], "claims 4294967295 bytes, 1 are left"),
        (b"\x01\x00\x00\x00Axyz", "BYTES", [1], "3 bytes follow"),
        (b"\x01\x00\x00\x00Axyz", "BYTES", [2], "the data ends after 1"),
        (b"", "BYTES", [1], "the data ends after 0"),
        (b"A", "BYTES", [0], "1 bytes follow"),
        (b"\x00" * 16, "BYTES", [MAX_BYTES_ELEMENTS + 1], "at most 1000000"),
    ],
)
def test_malformed_tensors_are_refused(raw: bytes, datatype: str, shape: list[int], text: str) -> None:
    with pytest.raises(CodecError) as caught:
        from_bytes(raw, datatype, shape, Place("input 'x'", "inputs[0]", "raw_input_contents[0]"))
    assert text in str(caught.value)
    assert str(caught.value).startswith("input 'x': ")
    assert caught.value.field.startswith(("inputs[0].", "raw_input_contents[0]"))
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("count", [1, 900_000])
def test_bad_framing_is_found_before_objects_are_made(count: int) -> None:
    good = b"\x01\x00\x00\x00A" * count
    tracemalloc.start()
    try:
        with pytest.raises(CodecError):
            from_bytes(good + b"\x00", "BYTES", [count])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # `good + b"\x00"` is the one large allocation; the objects would take more than 33 bytes each.
    assert peak < len(good) + 100_000


@unhurried
@given(st.binary(max_size=40), st.sampled_from([*DATATYPES, "BF16"]), st.lists(st.integers(-1, 5), max_size=4))
def test_random_bytes_decode_or_are_refused(raw: bytes, datatype: str, shape: list[int]) -> None:
    try:
        decoded = from_bytes(raw, datatype, shape)
    except CodecError:
        return
    assert decoded.shape == tuple(shape)


@pytest.mark.parametrize(
    ("array", "datatype", "text"),
    [
        (np.zeros(1), "FP32", "FP32 is encoded from float32 arrays, got float64; convert it first"),
        (np.zeros(1, "i4"), "INT64", "got int32"),
        (np.zeros(1), "BF16", "BF16 is encoded from float32"),
        (np.array([1.5], object), "BYTES", "bytes or str, got float"),
        (np.array(["\ud800"], object), "BYTES", "without a UTF-8 form"),
        (np.zeros(1, "f4"), "FLOAT", "'FLOAT' is unknown"),
    ],
)
def test_encoding_never_converts_silently(array, datatype: str, text: str) -> None:
    with pytest.raises(CodecError, match=text):
        tensor_bytes(array, datatype)


def test_datatype_of_names_what_is_missing() -> None:
    assert [datatype_of(np.dtype(code)) for code in (">f4", "S3", "U3", "O", "bool")] == [
        "FP32",
        "BYTES",
        "BYTES",
        "BYTES",
        "BOOL",
    ]
    with pytest.raises(CodecError, match="complex64 has no datatype"):
        datatype_of(np.dtype("complex64"))


def test_hostile_names_are_escaped_and_cut() -> None:
    assert quoted("a\n\x1b[31m") == r"'a\n\x1b[31m'"
    assert len(quoted("x" * 1_000_000)) < 70
