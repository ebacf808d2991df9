"""The quantizers: native equals reference on any values, whatever the threads; what all methods keep to and refuse."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ptqtp_gguf.codec import native
from ptqtp_gguf.codec.tensor_type import TensorType
from ptqtp_gguf.codec.tp2_0 import TP2_0
from ptqtp_gguf.codec.tp2_1 import LEVELS, TP2_1, scale_to_float
from ptqtp_gguf.codec.tp2_2 import TP2_2
from ptqtp_gguf.conversion.prepare import stage_of
from ptqtp_gguf.errors import QuantizeError
from ptqtp_gguf.quantize.methods import METHODS, Method, direct, find, quantize

SEARCH, PAPER = METHODS["search"], METHODS["paper"]
CASES = [(t, m) for m in METHODS.values() if m.reference for t in m.types]
ids = [f"{t.name}-{m.name}" for t, m in CASES]


def rel_mse(t: TensorType, w: np.ndarray, packed: np.ndarray) -> float:
    delta = native.dequantize(t, packed).astype(np.float64) - w
    return float((delta**2).sum() / (w.astype(np.float64) ** 2).sum())


def sample(kind: str, n: int, seed: int = 7) -> np.ndarray:
    rng = np.random.default_rng(seed)
    size = (n, 1024)
    if kind == "t5":
        x = rng.standard_t(5, size)
    else:
        x = {"gaussian": rng.normal, "laplace": rng.laplace}[kind](size=size)
    return (0.02 * x).astype(np.float32)


@pytest.mark.parametrize(("t", "m"), CASES, ids=ids)
@pytest.mark.parametrize("kind", ["gaussian", "laplace", "t5"])
def test_native_equals_reference(t: TensorType, m: Method, kind: str, rng: np.random.Generator) -> None:
    w = sample(kind, 24)
    w[3, :256] = 0  # whole groups of zeros
    w[5] *= 1e-4  # below the scales' range
    w[6, ::3] = 0.25  # many ties
    importances = [None] + [rng.exponential(size=1024).astype(np.float32)] * m.takes_importance
    for h in importances:
        if h is not None:
            h[128:384] = 0  # groups whose inputs never fire
        assert np.array_equal(quantize(t, m, w, h), quantize(t, m, w, h, use_reference=True))


def odd_kinds(rng: np.random.Generator) -> np.ndarray:
    """Groups on which the fast ways of the native core must step aside, next to ones on which they need not."""
    n, levels = (2, 256), np.array(LEVELS)
    gauss = 0.02 * rng.normal(size=n)
    kinds = [
        gauss,
        gauss * 1e-20,
        np.clip(300 * gauss, -9.6875, 9.6875),
        np.where(gauss < 0, -0.0, 0.0),
        0.01 * rng.choice(levels, size=n),
        np.full(n, -0.3),
        np.where(rng.random(n) < 0.9, 0.0, gauss),
        0.25 * rng.integers(-3, 4, size=n),
        gauss * 2.0 ** -rng.integers(0, 120, size=n),
        np.where(gauss > 0.03, 9, 1e-9),
        0.1 * rng.integers(-1, 2, size=n) + 0.05 * rng.integers(-1, 2, size=n),
        2.0**-126 * rng.integers(-9, 9, size=n),
    ]
    w = np.concatenate(kinds).astype(np.float32)
    coarse = (w.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)  # as from bf16
    return np.concatenate([w, coarse])


@pytest.mark.parametrize(("t", "m"), CASES, ids=ids)
def test_native_equals_reference_on_odd_kinds(t: TensorType, m: Method, rng: np.random.Generator) -> None:
    w = odd_kinds(rng)
    for h in [None] + [rng.exponential(size=256).astype(np.float32)] * m.takes_importance:
        if h is not None:
            h[32:64] = 0
        assert np.array_equal(quantize(t, m, w, h), quantize(t, m, w, h, use_reference=True))
    # rows one by one: `paper` then stops each by itself
    for row in w[::3] if m is PAPER else w[:0]:
        assert np.array_equal(quantize(t, m, row[None]), quantize(t, m, row[None], use_reference=True))


extreme = st.floats(-9.5, 9.5, width=32) | st.sampled_from([0.0, -0.0, 1e-30, 1e-5, 0.5, 9.6875, -9.6875])


@given(hnp.arrays(np.float32, (2, 128), elements=extreme))
@settings(max_examples=60, deadline=None)
def test_native_equals_reference_on_odd_values(w: np.ndarray) -> None:
    for t, m in CASES:
        assert np.array_equal(quantize(t, m, w), quantize(t, m, w, use_reference=True)), (t.name, m.name)


@pytest.mark.parametrize(("t", "m"), CASES, ids=ids)
def test_bytes_do_not_depend_on_threads(t: TensorType, m: Method) -> None:
    w = sample("laplace", 200)
    first = quantize(t, m, w, threads=1)
    assert all(np.array_equal(first, quantize(t, m, w, threads=n)) for n in (2, 3, 7))


def test_exact_levels_come_back_exactly(rng: np.random.Generator) -> None:
    levels = np.array(LEVELS, np.float32)
    for top in (1, 2, 3, 5):
        allowed = levels[np.abs(levels) <= top]
        codes = rng.integers(0, 256, size=300).astype(np.uint8)
        w = scale_to_float(codes)[:, None] * rng.choice(allowed, size=(300, 32))
        w[:, 0] = scale_to_float(codes) * top
        assert np.array_equal(native.dequantize(TP2_1, quantize(TP2_1, SEARCH, w)), w)
    a1, a2 = np.float16(0.134), np.float16(0.09)
    trits = rng.integers(-1, 2, size=(2, 40, 128))
    w = (np.float32(a1) * trits[0] + np.float32(a2) * trits[1]).astype(np.float32)
    assert rel_mse(TP2_0, w, quantize(TP2_0, SEARCH, w)) < 1e-6


def test_all_equal_and_ramp() -> None:
    equal = np.full((1, 128), 0.3, np.float32)
    ramp = np.linspace(-1, 1, 128, dtype=np.float32)[None]
    for t, m in CASES:
        # one scale holds it all but for its own rounding: 2^-5 of 4-bit mantissas, 2^-11 of fp16
        assert rel_mse(t, equal, quantize(t, m, equal)) < (2.0**-5) ** 2
        assert 0.005 < rel_mse(t, ramp, quantize(t, m, ramp)) < 0.05


# ---- what is refused ----


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("use_reference", [False, True])
def test_values_that_are_not_finite_are_refused(bad: float, use_reference: bool) -> None:
    w = sample("gaussian", 3)
    w[2, 77] = bad
    with pytest.raises(QuantizeError, match="not finite"):
        quantize(TP2_1, SEARCH, w, use_reference=use_reference)


def test_wrong_arguments_are_refused() -> None:
    w = sample("gaussian", 2)
    with pytest.raises(QuantizeError, match="no method 'best'; there are search, paper"):
        find("best")
    with pytest.raises(QuantizeError, match="paper makes TP2_0, not TP2_1"):
        quantize(TP2_1, PAPER, w)
    with pytest.raises(QuantizeError, match="takes no importance"):
        quantize(TP2_0, PAPER, w, np.ones(1024, np.float32))
    with pytest.raises(QuantizeError, match="importance of shape"):
        quantize(TP2_1, SEARCH, w, np.ones(1000, np.float32))
    with pytest.raises(QuantizeError, match="importance is negative"):
        quantize(TP2_1, SEARCH, w, np.full(1024, -1, np.float32))
    with pytest.raises(QuantizeError, match="multiple of 32"):
        quantize(TP2_1, SEARCH, w[:, :40])
    with pytest.raises(QuantizeError, match="reach"):
        quantize(TP2_1, SEARCH, np.full((1, 32), 9.7, np.float32))


def test_the_c_table_has_the_same_methods() -> None:
    direct = {m.name: m for m in METHODS.values() if m.reference}
    assert {(TP2_2, SEARCH), (TP2_1, SEARCH), (TP2_0, SEARCH), (TP2_0, PAPER)} <= set(CASES)
    assert native.methods().keys() == direct.keys()
    for row in native.methods().values():
        m = direct[row.name]
        assert (row.whole_matrix, row.takes_importance) == (m.whole_matrix, m.takes_importance)
        assert set(row.types) == {t.id for t in m.types}


def test_a_method_with_stages_is_whole() -> None:
    """Each stage is a module with `run`; a direct method takes what they leave, and makes what they make."""
    for m in METHODS.values():
        assert bool(m.stages) == bool(m.rest) == (m.reference is None)
        assert all(callable(stage_of(stage)) for stage in m.stages)
        assert set(m.types) <= set(direct(m).types)
        if m.stages:
            with pytest.raises(QuantizeError, match="looks at the model"):
                quantize(m.types[0], m, np.zeros((1, 32), np.float32))
