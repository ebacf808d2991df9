"""PTQTP exactly as published: Algorithm 1 of arXiv 2509.16989, in float64, groups of 128, type TP2_0.

Start both planes at sign(w) with 0 -> +1, scales at 1 and the ridge at 1e-8. Repeat up to 50 times: the scales by ridge
least squares, with the ridge grown where the 2x2 system is ill-conditioned (v1/v2: bound 1e12, growth by the square
root of the excess, at most 1.0); then for each weight the best of the nine pairs, ties to the first in lexicographic
order over (-1, 0, 1)^2. Stop when no group of the matrix moved its scales by 1e-4 or more (absolute, as published).
The scales are stored as fp16; the planes stay as the algorithm left them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..codec import F32, F64, TP2_0, U8, TensorType, pack
from ..errors import OutOfReach
from .sums import lane_sum

MAX_ITERS = 50
EPSILON = 1e-4
LAMBDA = 1e-8
LAMBDA_MAX = 1.0
KAPPA_MAX = 1e12


def solve_scales(w: F64, t1: F64, t2: F64, ridge: F64) -> tuple[F64, F64, F64]:
    """Ridge least squares of both scales. w, t1, t2 (N, 128); ridge (N,). Returns a1, a2 and the grown ridge, (N,)."""
    s11, s22, s12 = lane_sum(t1 * t1), lane_sum(t2 * t2), lane_sum(t1 * t2)
    b1, b2 = lane_sum(t1 * w), lane_sum(t2 * w)
    while True:
        a11, a22 = s11 + ridge, s22 + ridge
        det = a11 * a22 - s12 * s12
        with np.errstate(divide="ignore", invalid="ignore"):
            kappa = (a11 * a11 + a22 * a22 + 2 * (s12 * s12)) / det
        grow = ~((kappa < KAPPA_MAX) | (ridge >= LAMBDA_MAX))
        if not grow.any():
            break
        grown = np.minimum(ridge * np.sqrt(kappa / KAPPA_MAX), LAMBDA_MAX)
        ridge = np.where(grow, grown, ridge)
    return (b1 * a22 - b2 * s12) / det, (b2 * a11 - b1 * s12) / det, ridge


def best_pairs(w: F64, a1: F64, a2: F64) -> tuple[F64, F64]:
    """The nearest of the nine pairs for each weight, the first of equals. w (N, 128); a1, a2 (N,)."""
    best = np.full(w.shape, np.finfo(np.float64).max)
    t1, t2 = np.zeros_like(w), np.zeros_like(w)
    for c1 in (-1.0, 0.0, 1.0):
        for c2 in (-1.0, 0.0, 1.0):
            e = w - (a1 * c1 + a2 * c2)[:, None]
            e2 = e * e
            less = e2 < best
            best = np.where(less, e2, best)
            t1 = np.where(less, c1, t1)
            t2 = np.where(less, c2, t2)
    return t1, t2


def fit(w: F64, max_iters: int = MAX_ITERS, epsilon: float = EPSILON) -> tuple[F64, F64, F64, F64]:
    """Algorithm 1 on groups w (N, 128). Returns a1, a2 (N,) and planes t1, t2 (N, 128) with values -1, 0, 1."""
    a1, a2 = np.ones(len(w)), np.ones(len(w))
    ridge = np.full(len(w), LAMBDA)
    t1 = np.where(w < 0, -1.0, 1.0)
    t2 = t1.copy()
    for _ in range(max_iters):
        n1, n2, ridge = solve_scales(w, t1, t2, ridge)
        change = np.sqrt((n1 - a1) * (n1 - a1) + (n2 - a2) * (n2 - a2))
        a1, a2 = n1, n2
        t1, t2 = best_pairs(w, a1, a2)
        if change.max(initial=0.0) < epsilon:
            break
    return a1, a2, t1, t2


def to_digits(t1: F64, t2: F64) -> U8:
    """Trit planes to base-9 digits. Any shape."""
    return (3 * (t1 + 1) + (t2 + 1)).astype(np.uint8)


def half_scales(a1: NDArray[np.floating], a2: NDArray[np.floating]) -> NDArray[np.float16]:
    """Scales (N,) and (N,) to fp16 (N, 2), through float32. Raises OutOfReach where one overflows."""
    with np.errstate(over="ignore"):
        alphas = np.stack([a1, a2], axis=-1).astype(np.float32).astype(np.float16)
    if not np.isfinite(alphas).all():
        raise OutOfReach("weight beyond the reach of the type's scales")
    return alphas


def reference(t: TensorType, weights: F32, importance: F32 | None = None) -> U8:
    """weights float32 (R, C) -> packed TP2_0 rows. Takes no importance."""
    del t, importance
    rows, cols = weights.shape
    w = weights.reshape(-1, TP2_0.group).astype(np.float64)
    a1, a2, t1, t2 = fit(w)
    return pack(TP2_0, to_digits(t1, t2).reshape(rows, cols), half_scales(a1, a2).reshape(rows, -1, 2))
