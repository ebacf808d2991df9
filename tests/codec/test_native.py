"""Native pieces of a streaming converter: statistics, checksum, second decoder, scan, other types to and from float."""

from __future__ import annotations

import itertools

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ptqtp_gguf.codec import native
from ptqtp_gguf.codec import reference as packing
from ptqtp_gguf.codec import types as fmt
from ptqtp_gguf.codec.tensor_type import TensorType
from ptqtp_gguf.codec.tp2_0 import TP2_0
from ptqtp_gguf.codec.tp2_1 import MAX_LEVEL, SMALLEST_SCALE, TP2_1
from ptqtp_gguf.codec.tp2_2 import TP2_2
from ptqtp_gguf.codec.unit import POW2, POW5
from ptqtp_gguf.errors import QuantizeError

MASK = (1 << 64) - 1
CASES = [(TP2_2, "search"), (TP2_1, "search"), (TP2_0, "search"), (TP2_0, "paper")]
Q = gguf.GGMLQuantizationType


def hash_by_hand(x: np.ndarray, first: int = 0) -> int:
    """The definition in native/codec/hash.h, in Python's own integers."""
    total = 0
    for i, bits in enumerate(x.view(np.uint32).ravel().tolist()):
        key = (first + i + 1) * 0x9E3779B97F4A7C15 & MASK
        z = (bits ^ key >> 32) * 0xD6E8FEB9 + key & MASK
        z ^= z >> 32
        z = z * 0x9FB21C65 & MASK
        total += z ^ z >> 29
    return total & MASK


def some_weights(rng: np.random.Generator, rows: int = 5, cols: int = 384) -> np.ndarray:
    w = (rng.normal(size=(rows, cols)) * 0.05).astype(np.float32)
    w[0, :128] = 0
    w[1, :64] = -0.0
    w[2] *= 1e-5
    return w


@pytest.mark.parametrize("first", [0, 1, 2**32 - 3, 2**40 + 5])
def test_hash_is_its_definition(first: int, rng: np.random.Generator) -> None:
    for n in (0, 1, 7, 33, 1000):
        x = rng.normal(size=n).astype(np.float32)
        assert native.float_hash(x, first) == hash_by_hand(x, first)


def test_hash_adds_up_over_pieces_and_threads(rng: np.random.Generator) -> None:
    x = rng.normal(size=300_001).astype(np.float32)
    whole = native.float_hash(x, 7)
    assert all(native.float_hash(x, 7, threads=n) == whole for n in (1, 2, 5))
    cuts = [0, 1, 65_537, 200_000, len(x)]
    assert sum(native.float_hash(x[a:b], 7 + a) for a, b in itertools.pairwise(cuts)) & MASK == whole


def test_hash_sees_every_change(rng: np.random.Generator) -> None:
    x = rng.normal(size=256).astype(np.float32)
    x[10] = 0.0
    seen = {native.float_hash(x)}
    for i in range(len(x)):
        for bit in range(32):  # the sign of a zero included
            y = x.copy()
            y.view(np.uint32)[i] ^= np.uint32(1 << bit)
            seen.add(native.float_hash(y))
    assert len(seen) == 1 + 256 * 32
    for i in range(1, len(x)):  # two values swapped; all shifted by one place
        y = x.copy()
        y[[0, i]] = y[[i, 0]]
        seen.add(native.float_hash(y))
    seen |= {native.float_hash(x, first) for first in range(1, 100)}
    assert len(seen) == 1 + 256 * 32 + 255 + 99


@pytest.mark.parametrize(("t", "method"), CASES, ids=lambda c: getattr(c, "name", c))
def test_statistics_and_second_decoder(t: TensorType, method: str, rng: np.random.Generator) -> None:
    w = some_weights(rng)
    data, stats = native.quantize_stats(t, method, w, first=1000)
    assert np.array_equal(data, native.quantize(t, method, w))
    r = packing.dequantize(t, data)
    assert stats.hash == native.float_hash(r, 1000)
    exact = w.astype(np.float64)
    assert stats.power == pytest.approx((exact**2).sum(), rel=1e-12)
    assert stats.error == pytest.approx(((exact - r) ** 2).sum(), rel=1e-12)
    assert native.check(t, data, first=1000) == (None, stats.hash)
    assert native.check(t, data, first=1001)[1] != stats.hash


@pytest.mark.parametrize(("t", "method"), CASES, ids=lambda c: getattr(c, "name", c))
def test_statistics_do_not_depend_on_threads(t: TensorType, method: str, rng: np.random.Generator) -> None:
    w = some_weights(rng, 300, 512)
    h = None if method == "paper" else rng.exponential(size=512).astype(np.float32)
    data, stats = native.quantize_stats(t, method, w, h, threads=1)
    for n in (2, 5):
        again, others = native.quantize_stats(t, method, w, h, threads=n)
        assert np.array_equal(again, data) and others == stats
        assert native.check(t, data, threads=n) == (None, stats.hash)
    if method == "search":
        pieces = [native.quantize_stats(t, method, w[a : a + 100], h, first=a * 512)[1] for a in (0, 100, 200)]
        assert sum(p.hash for p in pieces) & MASK == stats.hash
        assert sum(p.error for p in pieces) == pytest.approx(stats.error, rel=1e-12)


@given(hnp.arrays(np.uint8, st.tuples(st.integers(1, 4), st.just(56))), st.sampled_from(list(fmt.TYPES.values())))
@settings(max_examples=150, deadline=None)
def test_second_decoder_agrees_on_any_bytes(data: np.ndarray, t: TensorType) -> None:
    assert native.check(t, data)[0] == packing.first_bad_block(t, data)


@pytest.mark.parametrize("t", fmt.TYPES.values(), ids=lambda t: t.name)
def test_second_decoder_on_all_scales_and_digits(t: TensorType, rng: np.random.Generator) -> None:
    digits = rng.integers(0, 9, size=(1024, t.block), dtype=np.uint8)
    if t.scale_dtype == "uint8":
        scales = np.arange(1024, dtype=np.uint32).astype(np.uint8)[:, None]
        data = packing.pack(t, digits, scales)
    else:
        halves = np.arange(0, 65536, 32, dtype=np.uint16)  # all signs and exponents, both scales
        halves = halves[halves & 0x7C00 != 0x7C00]
        scales = rng.choice(halves, size=(1024, 1, 2)).view(np.float16)
        data = packing.pack(TP2_0, digits, scales)
    assert native.check(t, data) == (None, hash_by_hand(packing.dequantize(t, data)))


def test_second_decoder_on_every_word() -> None:
    canonical = np.zeros(65536, bool)
    n = np.arange(POW5)
    canonical[-(-n * 65536 // POW5)] = True
    rest = np.zeros(256, bool)
    rest[-(-np.arange(POW2) * 256 // POW2)] = True
    for j in (*range(6), 13):
        size = 65536 if j < 6 else 256
        data = np.zeros((size, 14), np.uint8)
        if j < 6:
            data[:, 2 * j : 2 * j + 2] = np.arange(65536, dtype="<u2").view(np.uint8).reshape(-1, 2)
        else:
            data[:, 13] = np.arange(256)
        good = canonical if j < 6 else rest
        kept = data[good]
        assert native.check(TP2_1, kept) == (None, native.float_hash(packing.dequantize(TP2_1, kept)))
        for word in np.flatnonzero(~good)[::37]:
            assert native.check(TP2_1, data[word]) == (0, native.check(TP2_1, data[word])[1])
        assert native.check(TP2_1, data, threads=2)[0] == int((~good).argmax())


def test_second_decoder_sees_damage(rng: np.random.Generator) -> None:
    w = some_weights(rng, 300, 384)
    data, stats = native.quantize_stats(TP2_1, "search", w)
    for _ in range(200):
        damaged = data.copy()
        at = tuple(rng.integers(0, s) for s in data.shape)
        damaged[at] ^= np.uint8(1 << rng.integers(0, 8))
        bad, found = native.check(TP2_1, damaged)
        assert bad is not None or found != stats.hash
        assert bad == native.first_bad_block(TP2_1, damaged)
    swapped = data[::-1].copy()
    assert native.check(TP2_1, swapped)[0] is None and native.check(TP2_1, swapped)[1] != stats.hash
    with pytest.raises(QuantizeError, match="blocks have 14"):
        native.check(TP2_1, data.ravel()[:-1])


def test_every_half_and_bfloat() -> None:
    every = np.arange(65536, dtype=np.uint16)
    halves = native.to_float(1, every.view(np.uint8))
    want = every.view(np.float16).astype(np.float32)
    finite = np.isfinite(want)
    assert halves is not None
    assert np.array_equal(halves[finite].view(np.uint32), want[finite].view(np.uint32))
    assert np.array_equal(halves, want, equal_nan=True)
    brains = native.to_float(30, every.view(np.uint8))
    assert brains is not None
    assert np.array_equal(brains.view(np.uint32), every.astype(np.uint32) << 16)


def test_to_float_takes_what_it_knows(rng: np.random.Generator) -> None:
    x = rng.normal(size=(3, 96)).astype(np.float32)
    same = native.to_float(0, x.view(np.uint8))
    assert same is not None and np.array_equal(same, x.ravel())
    q = gguf.quants.quantize(x, Q.Q8_0)
    back = native.to_float(8, q)
    assert back is not None and np.array_equal(back, gguf.quants.dequantize(q, Q.Q8_0).ravel())
    buffer = np.empty(1000, np.float32)
    assert np.shares_memory(native.to_float(8, q, out=buffer), buffer) and np.array_equal(buffer[: x.size], back)
    assert native.to_float(2, q) is None
    with pytest.raises(QuantizeError, match="blocks have 34"):
        native.to_float(8, q.ravel()[:-2])
    with pytest.raises(QuantizeError, match="288 contiguous float32"):
        native.to_float(8, q, out=buffer[:100])


any_finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
usual = st.floats(-2, 2, width=32)


@given(hnp.arrays(np.float32, st.tuples(st.integers(1, 3), st.sampled_from([32, 96])), elements=any_finite | usual))
@settings(max_examples=200, deadline=None)
def test_bytes_of_gguf_py(x: np.ndarray) -> None:
    with np.errstate(all="ignore"):
        assert np.array_equal(native.to_q8_0(x), gguf.quants.quantize(x, Q.Q8_0))
    assert np.array_equal(native.to_bf16(x), gguf.quants.quantize(x, Q.BF16))


def test_bytes_of_gguf_py_on_many(rng: np.random.Generator) -> None:
    bits = rng.integers(0, 2**32, size=(400, 512), dtype=np.uint64).astype(np.uint32)
    anything = bits.view(np.float32)
    anything = np.where(np.isfinite(anything), anything, 0).astype(np.float32)
    halves = (rng.integers(-254, 255, size=(400, 512)) / 254).astype(np.float32)  # half-way cases at d = 1/127
    halves[:, ::32] = 1
    for x in (anything, halves, rng.normal(size=(400, 512)).astype(np.float32)):
        with np.errstate(all="ignore"):
            assert np.array_equal(native.to_q8_0(x, threads=2), gguf.quants.quantize(x, Q.Q8_0))
        assert np.array_equal(native.to_bf16(x), gguf.quants.quantize(x, Q.BF16))
    with pytest.raises(QuantizeError, match="multiple of 32"):
        native.to_q8_0(halves[:, :40])


def scan_by_hand(x: np.ndarray, group: int, floor: float) -> native.Scan:
    finite = np.where(np.isfinite(x), np.abs(x), 0).astype(np.float32)
    tops = np.maximum.reduceat(finite, np.arange(0, len(x), group)) if len(x) else np.zeros(1, np.float32)
    bad = np.flatnonzero(~np.isfinite(x))
    return native.Scan(
        int(bad[0]) if len(bad) else -1,
        float(tops.max()),
        int((tops > 0).sum()),
        int(((tops > 0) & (tops < floor)).sum()),
    )


@pytest.mark.parametrize("group", [1, 32, 128, 40])
def test_scan(group: int, rng: np.random.Generator) -> None:
    floor = MAX_LEVEL * SMALLEST_SCALE
    x = rng.normal(size=200_000).astype(np.float32)
    x[:70_000] *= 1e-5
    x[70_000:80_000] = 0
    x[80_000] = floor
    for n in (0, 1, 31, 200_000):
        assert native.scan(x[:n], group, floor) == scan_by_hand(x[:n], group, floor)
    for at, value in ((199_999, np.nan), (150_000, -np.inf), (67_000, np.nan), (66_990, np.inf)):
        x[at] = value
        for threads in (1, 3):
            assert native.scan(x, group, floor, threads=threads) == scan_by_hand(x, group, floor)


def test_a_kernel_is_chosen_and_all_are_listed() -> None:
    names = [name for name, _, _ in native.kernels()]
    assert names[-1] == "scalar"
    for t in fmt.TYPES.values():
        runs = [name for name, kind, supported in native.kernels() if kind == t.id and supported]
        assert native.kernel_for(t) == runs[0]
