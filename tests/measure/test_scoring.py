"""Figures of logits: by hand, against the definitions in float64, and kept on disk."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ptqtp_gguf.errors import BenchError, OutputError
from ptqtp_gguf.llamacpp import install
from ptqtp_gguf.measure import perplexity_tool
from ptqtp_gguf.measure.cache import Job, Records, finite, keep, kept
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


# ---- records ----

JOB: Job = {"text": "x", "ctx": 8}


def test_records_are_taken_up(tmp_path: Path) -> None:
    first = Records(tmp_path / "state", JOB, 3)
    for i in range(4):
        first.add(i, some_rows(3 + 0 * i))
    again = Records(tmp_path / "state", JOB, 3)
    assert sorted(again.windows) == [0, 1, 2, 3] and np.array_equal(again.all(4), first.all(4))
    assert not Records(tmp_path / "state", {**JOB, "ctx": 9}, 3).windows


@pytest.mark.parametrize("how", ["flipped", "torn", "foreign", "garbage"])
def test_damaged_records_are_thrown_away(tmp_path: Path, how: str) -> None:
    records = Records(tmp_path, JOB, 3)
    for i in range(3):
        records.add(i, some_rows(3))
    (path,) = tmp_path.iterdir()
    raw = bytearray(path.read_bytes())
    left = {0, 2}
    if how == "flipped":
        raw[len(raw) // 2] ^= 4
    elif how == "torn":
        raw, left = raw[:-5], {0, 1}
    elif how == "foreign":  # the frames of another job, under this job's name
        other = Records(tmp_path, {**JOB, "text": "y"}, 3)
        other.add(1, some_rows(3))
        third = len(raw) // 3
        raw[third : 2 * third] = next(p for p in tmp_path.iterdir() if p != path).read_bytes()
    else:
        raw, left = bytearray(b"\0" * 1000), set()
    path.write_bytes(raw)
    again = Records(tmp_path, JOB, 3)
    assert set(again.windows) == left
    again.add(1 if how != "torn" else 2, some_rows(3))
    assert set(Records(tmp_path, JOB, 3).windows) == left | {1 if how != "torn" else 2}


def test_small_results_and_errors(tmp_path: Path) -> None:
    keep(tmp_path, JOB, {"values": [1, 2]})
    assert kept(tmp_path, JOB) == {"values": [1, 2]} and kept(tmp_path, {"ctx": 1}) is None
    (path,) = tmp_path.iterdir()
    path.write_text(path.read_text().replace("[1, 2]", "[1, 3]"))
    assert kept(tmp_path, JOB) is None
    assert kept(None, JOB) is None
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"file.*--state"):
        Records(tmp_path / "file", JOB, 3)
    bad = some_rows(3)
    bad["kld"][1] = np.nan
    assert finite(some_rows(3)) and not finite(bad)


# ---- what llama-perplexity prints ----

PRINTED = """
Mean PPL(Q)                   :  19.040000 ±   0.840000
Mean PPL(base)                :  18.000000 ±   0.800000
Cor(ln(PPL(Q)), ln(PPL(base))):  99.90%
Mean PPL(Q)/PPL(base)         :   1.057778 ±   0.004000
Mean PPL(Q)-PPL(base)         :   1.040000 ±   0.070000

Mean    KLD:   0.053570 ±   0.000900
Maximum KLD:   4.100000
99.9%   KLD:   1.010000
99.0%   KLD:   0.300000
Median  KLD:   0.034400
 1.0%   KLD:   0.000100

Mean    Δp: -0.100 ±  0.050 %
RMS Δp    :  5.360 ±  0.090 %
Same top p: 87.400 ±  0.370 %
"""


def test_llama_perplexity_is_read() -> None:
    q = perplexity_tool.parse(PRINTED, 2, 510)
    assert (q.ppl, q.ppl_se, q.ppl_reference, q.ppl_ratio, q.ppl_ratio_se) == (19.04, 0.84, 18.0, 1.057778, 0.004)
    assert (q.kld, q.kld_se, q.kld_median, q.kld_99, q.kld_999, q.kld_max) == (0.05357, 0.0009, 0.0344, 0.3, 1.01, 4.1)
    assert (q.rms_dp, q.rms_dp_se, q.same_top, q.same_top_se, q.windows, q.tokens) == (5.36, 0.09, 87.4, 0.37, 2, 510)
    assert perplexity_tool.parse(PRINTED.replace("0.053570", "    -nan"), 2, 510).kld is None
    with pytest.raises(BenchError, match=r"no figure for same_top; its last line: RMS .p"):
        perplexity_tool.parse(PRINTED[: PRINTED.index("Same top")], 2, 510)
    with pytest.raises(BenchError, match="no figure for ppl; its last line: nothing"):
        perplexity_tool.parse("", 2, 510)


def test_output_that_was_lost_is_asked_for_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    answers = ["", "Mean PPL(Q)", PRINTED]
    monkeypatch.setattr(install, "run_tool", lambda *words: answers.pop(0))
    assert perplexity_tool._figures(tmp_path, [], 2, 512).tokens == 510 and not answers
