"""`search`: good enough against the table, the best of all scale codes, weighed by importance."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ptqtp_gguf.codec import native
from ptqtp_gguf.codec.tensor_type import TensorType
from ptqtp_gguf.codec.tp2_0 import TP2_0
from ptqtp_gguf.codec.tp2_1 import TP2_1, scale_to_float
from ptqtp_gguf.codec.tp2_2 import TP2_2
from ptqtp_gguf.quantize import search
from ptqtp_gguf.quantize.methods import METHODS, quantize

SEARCH, PAPER = METHODS["search"], METHODS["paper"]


def rel_mse(t: TensorType, w: np.ndarray, packed: np.ndarray) -> float:
    delta = native.dequantize(t, packed).astype(np.float64) - w
    return float((delta**2).sum() / (w.astype(np.float64) ** 2).sum())


def sample(kind: str, n: int, seed: int = 7) -> np.ndarray:
    rng = np.random.default_rng(seed)
    draw: dict[str, Any] = {
        "gaussian": rng.normal,
        "laplace": rng.laplace,
        "t5": lambda size: rng.standard_t(5, size),
    }
    x = draw[kind](size=(n, 1024))
    return (0.02 * x).astype(np.float32)


# The table of docs/format.md: relative MSE at 3.5 bits a weight, all weights alike; search must be no worse than it by
# more than 2 %, and (the other side of the bound) not better than any quantizer of its kind can be.
@pytest.mark.parametrize(
    ("t", "kind", "table"),
    [
        (TP2_1, "gaussian", 0.0206),
        (TP2_1, "laplace", 0.0281),
        (TP2_1, "t5", 0.0284),
        (TP2_2, "gaussian", 0.0154),
        (TP2_2, "laplace", 0.0206),
        (TP2_2, "t5", 0.0210),
        (TP2_0, "gaussian", 0.0256),
        (TP2_0, "laplace", 0.0398),
        (TP2_0, "t5", 0.0422),
    ],
)
def test_search_reaches_the_table(t: TensorType, kind: str, table: float) -> None:
    w = sample(kind, 384 if t is TP2_0 else 1024)
    got = rel_mse(t, w, quantize(t, SEARCH, w, np.ones(1024, np.float32)))
    assert 0.9 * table < got <= 1.02 * table


def large_count_more(w: np.ndarray) -> np.ndarray:
    """The documented h of TP2_1 and TP2_2 without an importance, 2 mean|w| + |w| of each group of 32, in float64."""
    a = np.abs(w.astype(np.float64)).reshape(-1, 32)
    return (2 * a.mean(axis=1, keepdims=True) + a).reshape(w.shape)


# Without an importance large weights count more: this relative MSE weighted so, and that one with all weights alike.
@pytest.mark.parametrize(
    ("t", "kind", "weighted", "alike"),
    [
        (TP2_1, "gaussian", 0.01710, 0.02084),
        (TP2_1, "laplace", 0.01912, 0.02872),
        (TP2_1, "t5", 0.01962, 0.02941),
        (TP2_2, "gaussian", 0.01155, 0.01565),
        (TP2_2, "laplace", 0.01282, 0.02118),
        (TP2_2, "t5", 0.01342, 0.02167),
    ],
)
def test_search_alone_lets_large_weights_count_more(t: TensorType, kind: str, weighted: float, alike: float) -> None:
    w = sample(kind, 1024)
    h = large_count_more(w)
    packed = quantize(t, SEARCH, w)
    e2 = (native.dequantize(t, packed).astype(np.float64) - w) ** 2
    assert (h * e2).sum() / (h * w.astype(np.float64) ** 2).sum() == pytest.approx(weighted, rel=0.01)
    assert rel_mse(t, w, packed) == pytest.approx(alike, rel=0.01)


def test_search_tp2_0_alone_is_plain_squared_error() -> None:
    w = sample("laplace", 24)
    assert np.array_equal(quantize(TP2_0, SEARCH, w), quantize(TP2_0, SEARCH, w, np.ones(1024, np.float32)))


def test_an_importance_that_never_fires_is_one_of_ones() -> None:
    w = sample("laplace", 24)
    ones, h = np.ones(1024, np.float32), np.ones(1024, np.float32)
    h[128:640] = 0
    for t in (TP2_0, TP2_1, TP2_2):
        assert np.array_equal(quantize(t, SEARCH, w, h), quantize(t, SEARCH, w, ones))
    for t in (TP2_1, TP2_2):
        assert not np.array_equal(quantize(t, SEARCH, w), quantize(t, SEARCH, w, ones))


@pytest.mark.parametrize("importance", [None, np.ones(32, np.float32)], ids=["alone", "ones"])
def test_search_tp2_1_is_the_best_of_all_256_codes(importance: np.ndarray | None) -> None:
    w = np.concatenate([sample(k, 20).reshape(-1, 32) for k in ("gaussian", "laplace", "t5")])
    a, h = np.abs(w), large_count_more(w) if importance is None else np.ones(w.shape)
    best = np.full(len(w), np.inf)
    for code in range(256):
        s = scale_to_float(np.full(len(w), code, np.uint8))
        e = a - s[:, None] * search.nearest_level(a, s).astype(np.float32)
        best = np.minimum(best, (h * e.astype(np.float64) ** 2).sum(axis=1))
    packed = quantize(TP2_1, SEARCH, w, importance)
    got = (h * (native.dequantize(TP2_1, packed).astype(np.float64) - w) ** 2).sum(axis=1)
    assert got.sum() <= 1.0001 * best.sum()


def test_search_of_zeros_is_code_0() -> None:
    w = np.where(np.arange(64) % 3, 0.0, -0.0).astype(np.float32)[None]
    for h in (None, np.ones(64, np.float32), np.zeros(64, np.float32)):
        for use_reference in (False, True):
            for t in (TP2_1, TP2_2):
                digits, codes = native.unpack(t, quantize(t, SEARCH, w, h, use_reference=use_reference))
                assert (digits == 4).all() and (codes == 0).all()


def test_search_is_never_worse_than_paper() -> None:
    for kind in ("gaussian", "laplace", "t5"):
        w = sample(kind, 100).reshape(-1, 128)
        errors = []
        for m in (SEARCH, PAPER):
            values = native.dequantize(TP2_0, quantize(TP2_0, m, w)).astype(np.float64)
            errors.append(((values - w) ** 2).sum(axis=1))
        assert (errors[0] <= errors[1] * (1 + 1e-3)).all()
        assert errors[0].sum() < 0.99 * errors[1].sum()


def test_importance_moves_the_error_where_it_matters_less(rng: np.random.Generator) -> None:
    w = sample("gaussian", 256)
    h = np.where(np.arange(1024) % 2, 1.0, 0.01).astype(np.float32)
    for t in (TP2_0, TP2_1, TP2_2):
        weighted = []
        for importance in (None, h):
            delta = native.dequantize(t, quantize(t, SEARCH, w, importance)).astype(np.float64) - w
            weighted.append(float((delta**2 * h).sum()))
        assert weighted[1] < 0.97 * weighted[0]
