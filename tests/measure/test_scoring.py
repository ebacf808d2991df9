"""Figures of logits: by hand, against the definitions in float64, and kept on disk."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ptqtp_gguf.measure.scoring import RECORD, Logits, Rows, alone, score, summarize


def logs(*rows: tuple[float, ...]) -> np.ndarray:
    return np.log(np.array(rows, np.float32))


def test_by_hand() -> None:
    """Probabilities whose figures one can work out: (1/2, 1/4, 1/4) expected, (1/4, 1/2, 1/4) found."""
    reference = Logits.of(logs((0.5, 0.25, 0.25)) + np.float32(3))  # logits mean nothing but for their differences
    found = Logits.of(logs((0.25, 0.5, 0.25)) - np.float32(2))
    (row,) = score(found, np.array([0], np.int32), reference)
    assert row["nll"] == pytest.approx(math.log(4), abs=1e-6) and row["nll_ref"] == pytest.approx(math.log(2), abs=1e-6)
    assert row["kld"] == pytest.approx(0.5 * math.log(2) - 0.25 * math.log(2), abs=1e-6)
    assert row["dp"] == pytest.approx(-0.25, abs=1e-6) and row["same_top"] == 0
    (same,) = score(reference, np.array([2], np.int32), reference)
    assert (same["kld"], same["dp"], same["same_top"]) == (0, 0, 1)


@settings(max_examples=30, deadline=None)
@example(88743, 17.46875, 19, 19)
@given(st.integers(0, 2**32 - 1), st.floats(0.01, 20), st.integers(2, 400), st.integers(1, 40))
def test_against_the_definitions(seed: int, spread: float, vocabulary: int, n: int) -> None:
    """float32 logits of size d and differences of them have rounding errors of some d * 2^-24, so has a probability, of
    its own size; a divergence sums differences weighed by probabilities, which sum to one."""
    rng = np.random.default_rng(seed)
    a, b = (rng.normal(size=(n, vocabulary), scale=spread).astype(np.float32) for _ in range(2))
    tokens = rng.integers(0, vocabulary, n).astype(np.int32)
    with ThreadPoolExecutor(2) as pool:
        rows = score(Logits.of(b, pool), tokens, Logits.of(a, pool), pool)
    assert np.array_equal(rows, score(Logits.of(b), tokens, Logits.of(a)))
    la, lb = (x - np.log(np.exp(x).sum(1, keepdims=True)) for x in (a.astype(np.float64), b.astype(np.float64)))
    at = np.arange(n), tokens
    largest = np.abs(la - lb).max()
    bound = 2**-20 * (1 + largest + np.abs(a).max())
    assert np.abs(rows["nll"] + lb[at]).max() < bound and np.abs(rows["nll_ref"] + la[at]).max() < bound
    assert np.abs(rows["kld"] - (np.exp(la) * (la - lb)).sum(1)).max() < bound + 2**-22 * np.abs(a).max() * largest
    assert np.abs(rows["dp"] - np.exp(lb[at]) + np.exp(la[at])).max() < bound
    assert np.array_equal(rows["same_top"], a.argmax(1) == b.argmax(1))


def some_rows(n: int) -> Rows:
    rng = np.random.default_rng(n)
    rows = np.zeros(n, RECORD)
    for name in ("nll", "nll_ref", "kld"):
        rows[name] = rng.exponential(size=n)
    rows["dp"], rows["same_top"] = rng.uniform(-1, 1, n), rng.integers(0, 2, n)
    return rows


def test_summary() -> None:
    """Means and errors as llama-perplexity's sums of squares and products give them."""
    rows = some_rows(200)
    q = summarize(rows, 4, True)
    x, y, n = rows["nll"], rows["nll_ref"], 200

    def variance(v: np.ndarray, w: np.ndarray) -> float:
        return float((v * w).mean() - v.mean() * w.mean()) / (n - 1)

    assert q.ppl is not None
    assert q.ppl == pytest.approx(math.exp(x.mean())) and q.ppl_se == pytest.approx(q.ppl * math.sqrt(variance(x, x)))
    ratio_se = math.sqrt(variance(x, x) + variance(y, y) - 2 * variance(x, y))
    assert q.ppl_ratio_se == pytest.approx(math.exp((x - y).mean()) * ratio_se)
    square = rows["dp"] ** 2
    rms = math.sqrt(square.mean())
    assert q.rms_dp == pytest.approx(100 * rms)
    assert q.rms_dp_se == pytest.approx(100 * 0.5 / rms * math.sqrt(variance(square, square)))
    p = rows["same_top"].mean()
    assert q.same_top_se == pytest.approx(100 * math.sqrt(p * (1 - p) / 199))
    ordered = np.sort(rows["kld"])
    assert q.kld_median == pytest.approx((ordered[99] + ordered[100]) / 2) and q.kld_max == ordered[-1]
    assert q.kld_99 == pytest.approx(0.99 * ordered[197] + 0.01 * ordered[198])
    assert summarize(alone(rows), 4, False).ppl == q.ppl_reference
    rows["nll"] = 1e4
    assert summarize(rows, 4, False).as_dict()["ppl"] is None  # beyond float64; JSON has no infinity
