"""Golden bytes, round trips, and three decoders that must agree: numpy, C, and one written here by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest
from helpers import REPO
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ptqtp_gguf.codec import native
from ptqtp_gguf.codec import reference as packing
from ptqtp_gguf.codec import types as fmt
from ptqtp_gguf.codec.tensor_type import TensorType
from ptqtp_gguf.codec.tp2_0 import TP2_0
from ptqtp_gguf.codec.tp2_1 import TP2_1
from ptqtp_gguf.codec.unit import POW5, unpack_units
from ptqtp_gguf.errors import InputError, QuantizeError

GOLDEN = json.loads((REPO / "tests" / "golden" / "packing.json").read_text())
any_units = hnp.arrays(np.uint8, st.tuples(st.integers(1, 3), st.just(4 * 14)))


def decode_unit(unit: bytes) -> list[int]:
    """The third decoder: straight from the picture in docs/format.md, sharing nothing with the others."""
    weights = [0] * 32
    for j in range(7):
        fraction = unit[2 * j] + 256 * unit[2 * j + 1]
        for k in range(5 if j < 6 else 2):
            fraction *= 9
            digit, fraction = divmod(fraction, 65536)
            index = 2 * j + k if k < 2 else 14 + 2 * j + k - 2 if k < 4 else 26 + j
            weights[index] = digit
    return weights


CHAIN = """
    0 4  8 14 18 22 26 30
    1 5  9 15 19 23 28 12
    2 6 10 16 20 24 27 31
    3 7 11 17 21 25 29 13"""


def third_trits(t2: list[int]) -> list[int]:
    """Of 32 weights in weight order: the sum of the t2 of the two before, mod 3; before the first, minus the last."""
    order, p = [int(i) for i in CHAIN.split()], [0] * 32
    for c, i in enumerate(order):
        both = sum(t2[order[c - k]] if c >= k else -t2[order[c - k]] for k in (1, 2))
        p[i] = {0: 0, 1: 1, 2: -1}[both % 3]
    return p


def decode_by_hand(t: TensorType, row: bytes) -> list[float]:
    out: list[float] = []
    for b in range(0, len(row), t.size):
        units = [row[b + 14 * i : b + 14 * i + 14] for i in range(t.size // 14)]
        if t is not TP2_0:
            e, m = divmod(units[0][12], 16)
            trits = [(d // 3 - 1, d % 3 - 1) for d in decode_unit(units[0])]
            third = {"TP2_1": [0] * 32, "TP2_2": third_trits([t2 for _, t2 in trits])}[t.name]
            out += [
                (1 + m / 16) * 2.0 ** (e - 15) * (3 * t1 + 2 * t2 + p) for (t1, t2), p in zip(trits, third, strict=True)
            ]
        else:
            side = bytes(u[12] for u in units)
            a1, a2 = (float(x) for x in np.frombuffer(side, "<f2"))
            for u in units:
                out += [a1 * (d // 3 - 1) + a2 * (d % 3 - 1) for d in decode_unit(u)]
    return out


@pytest.mark.parametrize("case", GOLDEN, ids=lambda c: c["name"])
def test_golden_bytes(case: dict) -> None:
    t = fmt.BY_NAME[case["type"]]
    data = np.frombuffer(bytes.fromhex(case["hex"]), np.uint8)[None]
    digits = np.array(case["digits"], np.uint8)[None]
    scales = np.array(case["scales"], t.scale_dtype).reshape(t.scale_shape(1, len(case["digits"])))
    packed = packing.pack(t, digits, scales)
    assert packed.tobytes().hex() == case["hex"]
    assert native.pack(t, digits, scales).tobytes().hex() == case["hex"]
    values = np.array(case["values"], np.float32)
    assert np.array_equal(packing.dequantize(t, data)[0], values)
    assert np.array_equal(native.dequantize(t, data)[0], values)
    assert decode_by_hand(t, data.tobytes()) == case["values"]


def test_every_type_has_golden_bytes() -> None:
    assert {case["type"] for case in GOLDEN} == set(fmt.BY_NAME)
    assert len({case["name"] for case in GOLDEN}) == len(GOLDEN)


@given(data=st.data(), rows=st.integers(1, 3), blocks=st.integers(1, 4), t=st.sampled_from(list(fmt.TYPES.values())))
def test_round_trip_python_to_c_and_back(data: st.DataObject, rows: int, blocks: int, t: TensorType) -> None:
    cols = blocks * t.block
    digits = data.draw(hnp.arrays(np.uint8, (rows, cols), elements=st.integers(0, 8)))
    finite = st.floats(width=16, allow_nan=False, allow_infinity=False)
    any_scale = st.integers(0, 255) if t.scale_dtype == "uint8" else finite
    scales = data.draw(hnp.arrays(t.scale_dtype, t.scale_shape(rows, cols), elements=any_scale))
    packed = packing.pack(t, digits, scales)
    assert packed.tobytes() == native.pack(t, digits, scales).tobytes()
    for d, s in (packing.unpack(t, packed), native.unpack(t, packed)):
        assert np.array_equal(d, digits)
        assert s.tobytes() == scales.tobytes()
    assert packing.first_bad_block(t, packed) is None
    assert native.first_bad_block(t, packed) is None


@given(any_units, st.sampled_from(list(fmt.TYPES.values())))
@settings(max_examples=200)
def test_any_bytes_decode_alike(data: np.ndarray, t: TensorType) -> None:
    with np.errstate(invalid="ignore", over="ignore"):
        a, b = packing.dequantize(t, data), native.dequantize(t, data)
    assert a.tobytes() == b.tobytes() or np.array_equal(a, b, equal_nan=True)
    if t.levels:
        assert b.tolist() == [decode_by_hand(t, row.tobytes()) for row in data]
    digits = [decode_unit(data.reshape(-1, 14)[i].tobytes()) for i in range(data.size // 14)]
    assert np.array_equal(np.array(digits).reshape(len(data), -1), native.unpack(t, data)[0])
    assert np.array_equal(
        np.array(digits).reshape(len(data), -1), unpack_units(data.reshape(-1, 14)).reshape(len(data), -1)
    )
    assert packing.first_bad_block(t, data) == native.first_bad_block(t, data)


def test_every_word_that_no_packer_writes_is_named() -> None:
    data = np.zeros((65536, 14), np.uint8)
    data[:, :2] = np.arange(65536, dtype="<u2").view(np.uint8).reshape(-1, 2)
    good = [packing.first_bad_block(TP2_1, row[None]) is None for row in data[::97]]
    assert good == [native.first_bad_block(TP2_1, row) is None for row in data[::97]]
    canonical = {-(-n * 65536 // POW5) for n in range(POW5)}
    assert good == [w in canonical for w in range(0, 65536, 97)]
    bad = next(w for w in range(65536) if w not in canonical)
    blocks = np.zeros((1, 5 * 14), np.uint8)
    blocks[0, 3 * 14 + 4 : 3 * 14 + 6] = np.frombuffer(np.uint16(bad).tobytes(), np.uint8)
    assert packing.first_bad_block(TP2_1, blocks) == native.first_bad_block(TP2_1, blocks) == 3


def test_what_cannot_be_packed_is_refused() -> None:
    nine = np.full((1, 32), 9, np.uint8)
    for pack in (lambda d, s: packing.pack(TP2_1, d, s), lambda d, s: native.pack(TP2_1, d, s)):
        with pytest.raises(QuantizeError, match="digit"):
            pack(nine, np.zeros((1, 1), np.uint8))
    with pytest.raises(QuantizeError, match="rows of 40 weights"):
        packing.pack(TP2_1, np.zeros((1, 40), np.uint8), np.zeros((1, 1), np.uint8))
    with pytest.raises(InputError, match="14"):
        packing.dequantize(TP2_1, np.zeros((1, 15), np.uint8))
    with pytest.raises(QuantizeError, match="length"):
        native.first_bad_block(TP2_1, np.zeros(15, np.uint8))
