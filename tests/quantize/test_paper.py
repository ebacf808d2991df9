"""`paper`: the published algorithm."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from ptqtp_gguf.codec import native
from ptqtp_gguf.codec.tp2_0 import TP2_0
from ptqtp_gguf.quantize import paper
from ptqtp_gguf.quantize.methods import METHODS, quantize

PAPER = METHODS["paper"]


def sample(kind: str, n: int, seed: int = 7) -> np.ndarray:
    rng = np.random.default_rng(seed)
    draw: dict[str, Any] = {
        "gaussian": rng.normal,
        "laplace": rng.laplace,
        "t5": lambda size: rng.standard_t(5, size),
    }
    x = draw[kind](size=(n, 1024))
    return (0.02 * x).astype(np.float32)


def algorithm_1(w: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A direct float64 transcription of Algorithm 1, plain loops, for a matrix of groups (N, 128)."""
    pairs = list(itertools.product((-1, 0, 1), repeat=2))
    n = len(w)
    t1 = [[-1 if x < 0 else 1 for x in row] for row in w]
    t2 = [list(row) for row in t1]
    alpha = [np.ones(2) for _ in range(n)]
    ridge = [1e-8] * n
    for _ in range(50):
        moved = 0.0
        for i in range(n):
            s = np.array([t1[i], t2[i]], dtype=np.float64).T
            while True:
                a = s.T @ s + ridge[i] * np.eye(2)
                if np.linalg.norm(a) * np.linalg.norm(np.linalg.inv(a)) < 1e12 or ridge[i] >= 1:
                    break
                kappa = np.linalg.norm(a) * np.linalg.norm(np.linalg.inv(a))
                ridge[i] = min(ridge[i] * np.sqrt(kappa / 1e12), 1.0)
            b = s.T @ w[i]
            det = a[0, 0] * a[1, 1] - a[0, 1] ** 2
            new = np.array([b[0] * a[1, 1] - b[1] * a[0, 1], b[1] * a[0, 0] - b[0] * a[0, 1]]) / det
            moved = max(moved, float(np.linalg.norm(new - alpha[i])))
            alpha[i] = new
            for j in range(w.shape[1]):
                errors = [(w[i, j] - (new[0] * c1 + new[1] * c2)) ** 2 for c1, c2 in pairs]
                t1[i][j], t2[i][j] = pairs[errors.index(min(errors))]
        if moved < 1e-4:
            break
    return np.array(alpha), np.array(t1), np.array(t2)


@pytest.mark.parametrize("kind", ["gaussian", "laplace"])
def test_paper_is_algorithm_1(kind: str) -> None:
    w = sample(kind, 1)[0].reshape(-1, 128).astype(np.float64)
    alpha, t1, t2 = algorithm_1(w)
    a1, a2, p1, p2 = paper.fit(w)
    assert np.array_equal(p1, t1) and np.array_equal(p2, t2)
    assert np.allclose(np.stack([a1, a2], axis=1), alpha, rtol=1e-9)
    digits, halves = native.unpack(TP2_0, quantize(TP2_0, PAPER, w.astype(np.float32)))
    assert np.array_equal(digits, paper.to_digits(p1, p2))
    assert np.array_equal(halves[:, 0], paper.half_scales(a1, a2))


def test_paper_error_never_grows() -> None:
    w = sample("laplace", 8).reshape(-1, 128).astype(np.float64)
    before = np.full(len(w), np.inf)
    for iters in range(1, 25):
        a1, a2, t1, t2 = paper.fit(w, max_iters=iters, epsilon=0.0)
        error = ((w - a1[:, None] * t1 - a2[:, None] * t2) ** 2).sum(axis=1)
        assert (error <= before * (1 + 1e-12)).all()
        before = error


def test_paper_ends_where_the_authors_did() -> None:
    """Scale ratio near the released file's 1.476 and composite zeros near its 18 % (notes on the paper, 1.9)."""
    w = np.random.default_rng(3).normal(size=(400, 128))
    a1, a2, t1, t2 = paper.fit(w)
    ratio = np.maximum(np.abs(a1), np.abs(a2)) / np.minimum(np.abs(a1), np.abs(a2))
    zeros = ((t1 == 0) & (t2 == 0)) | (np.abs(a1[:, None] * t1 + a2[:, None] * t2) < 1e-12)
    assert 1.44 < np.median(ratio) < 1.54
    assert 0.15 < zeros.mean() < 0.19
    error = np.sqrt(((w - a1[:, None] * t1 - a2[:, None] * t2) ** 2).sum() / (w**2).sum())
    assert 0.164 < error < 0.168
