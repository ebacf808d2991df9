"""`search`: the best planes without calibration, optionally weighted by an importance per input.

What is smallest is a group's sum of h * error^2. With an importance, h is the importance alone; inputs that never fire
in a whole group count as 1, and all ones are plain squared error. Without one, TP2_0 takes 1, the others take
h = 2 mean|w| + |w|: large weights count more, as in llama.cpp's quantizers without an imatrix (ggml-quants.c,
quantize_row_q3_K_impl). On Qwen2.5-Coder-0.5B that took the mean KLD from .237 to .207; with 1 or 4 in the place of 2
it is .210 or .211, with |w| alone .214, with w^2 .258.

TP2_1. The scale is one of 256 codes, so the codes themselves are tried: -12..+13 around max|w|/5 (on Gaussian, Laplace
and Student-t5 data the optimum over all codes lies -9..+13 from it, but for one group in ten thousand), and the three
next to max|w|/2 and to max|w|, which make weights that already lie on inner levels exact. Nearest level each, smallest
error wins, the first of equals.

TP2_0. From five starts (four ratios a2/a1, and the paper's own result) alternate the nearest pair and least squares
until nothing changes; round the scales to fp16, assign once more, keep the smallest error.

TP2_2: trellis.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..codec import (
    F32,
    I64,
    T1_OF_DIGIT,
    T2_OF_DIGIT,
    TP2_0,
    TP2_1,
    TP2_2,
    U8,
    TensorType,
    digits_of_levels,
    pack,
    scale_from_float,
    scale_to_float,
)
from . import paper, trellis
from .sums import lane_sum

BELOW, ABOVE = 12, 13
RATIOS = (0.35, 0.6, 0.75, 0.9)
ITERS = 24


def _group_importance(importance: F32 | None, rows: int, group: int) -> F32 | None:
    """(C,) -> (R*C/G, G); a group without any importance counts as unweighted."""
    if importance is None:
        return None
    h = importance.reshape(-1, group)
    h = np.where((h > 0).any(axis=1, keepdims=True), h, np.float32(1))
    return np.tile(h, (rows, 1))


def candidates(top: F32) -> U8:
    """Scale codes to try for groups whose largest magnitude is top (N,): (N, 32)."""
    around5 = scale_from_float(top / np.float32(5)).astype(np.int64)[:, None] + np.arange(-BELOW, ABOVE + 1)
    around2 = scale_from_float(top / np.float32(2)).astype(np.int64)[:, None] + np.arange(-1, 2)
    around1 = scale_from_float(top).astype(np.int64)[:, None] + np.arange(-1, 2)
    codes: U8 = np.clip(np.concatenate([around5, around2, around1], axis=1), 0, 255).astype(np.uint8)
    return codes


def nearest_level(a: F32, s: F32) -> I64:
    """Index 0, 1, 2, 3, 5 of the nearest level to magnitudes a (N, G) at scales s (N,); ties to the smaller one."""
    s = s[:, None]
    half = np.float32(0.5)
    steps = [(a > half * s), (a > np.float32(1.5) * s), (a > np.float32(2.5) * s), (a > np.float32(4) * s)]
    return (steps[0].astype(np.int64) + steps[1] + steps[2] + 2 * steps[3]).astype(np.int64)


def own_weights(a: F32) -> F32:
    """The h of magnitudes a (N, 32) without an importance: (N, 32)."""
    return lane_sum(a)[:, None] * np.float32(2 / 32) + a


def best_code(a: F32, h: F32, total: Callable[[F32], F32] = lane_sum) -> U8:
    """Of the candidates for magnitudes a (N, 32) the code (N,) with the smallest sum of squared errors, weighted by
    h (N, 32); the first of equals. total: how to sum."""
    codes = candidates(np.fmax.reduce(a, axis=1))
    best = np.full(len(a), np.finfo(np.float32).max, np.float32)
    code = np.zeros(len(a), np.uint8)
    for c in range(codes.shape[1]):
        s = scale_to_float(codes[:, c])
        e = a - s[:, None] * nearest_level(a, s).astype(np.float32)
        err = total(e * e * h)
        less = err < best
        best = np.where(less, err, best)
        code = np.where(less, codes[:, c], code)
    return code


def fit_tp2_1(w: F32, h: F32 | None) -> tuple[U8, U8]:
    """w (N, 32), h (N, 32) or None -> digits (N, 32), scale codes (N,)."""
    a = np.abs(w)
    code = best_code(a, own_weights(a) if h is None else h)
    level = nearest_level(a, scale_to_float(code))
    return digits_of_levels(np.where(w < 0, -level, level)), code


def _assign(w: F32, h: F32 | None, a1: F32, a2: F32) -> tuple[I64, F32]:
    """Nearest pair of each weight, and the (weighted) error of each group."""
    best = np.full(w.shape, np.finfo(np.float32).max, np.float32)
    digits = np.zeros(w.shape, np.int64)
    for d in range(9):
        v = a1 * np.float32(T1_OF_DIGIT[d]) + a2 * np.float32(T2_OF_DIGIT[d])
        e = w - v[:, None]
        e2 = e * e
        less = e2 < best
        best = np.where(less, e2, best)
        digits = np.where(less, d, digits)
    return digits, lane_sum(best if h is None else best * h)


def _solve(w: F32, h: F32 | None, digits: I64) -> tuple[F32, F32]:
    """Least squares of both scales in float64, rounded to float32."""
    t1, t2 = T1_OF_DIGIT[digits].astype(np.float64), T2_OF_DIGIT[digits].astype(np.float64)
    x = w.astype(np.float64)
    g = np.ones_like(x) if h is None else h.astype(np.float64)
    s11, s22, s12 = lane_sum(g * (t1 * t1)), lane_sum(g * (t2 * t2)), lane_sum(g * (t1 * t2))
    b1, b2 = lane_sum(g * (t1 * x)), lane_sum(g * (t2 * x))
    det = s11 * s22 - s12 * s12
    good = det > 1e-9 * (s11 * s22)
    with np.errstate(divide="ignore", invalid="ignore"):
        a1 = np.where(good, (s22 * b1 - s12 * b2) / det, np.where(s11 > 0, b1 / s11, 0))
        a2 = np.where(good, (s11 * b2 - s12 * b1) / det, 0)
    return a1.astype(np.float32), a2.astype(np.float32)


def fit_tp2_0(w: F32, h: F32 | None) -> tuple[U8, NDArray[np.float16]]:
    """w (N, 128), h (N, 128) or None -> digits (N, 128), scales fp16 (N, 2)."""
    top = np.abs(w).max(axis=1)
    best = np.full(len(w), np.finfo(np.float32).max, np.float32)
    alphas = np.zeros((len(w), 2), np.float16)
    for ratio in (*RATIOS, None):
        if ratio is None:
            # every group to its own fixed point, not to the matrix' common stop
            p1, p2, _, _ = paper.fit(w.astype(np.float64), epsilon=0.0)
            a1, a2 = p1.astype(np.float32), p2.astype(np.float32)
        else:
            a1 = np.float32(0.9) * top / (1 + np.float32(ratio))
            a2 = a1 * np.float32(ratio)
        for _ in range(ITERS):  # at a fixed point the next round changes nothing: no need to stop early
            digits, _ = _assign(w, h, a1, a2)
            a1, a2 = _solve(w, h, digits)
        with np.errstate(over="ignore"):  # an overflow has an infinite error and never wins
            halves = np.stack([a1, a2], axis=-1).astype(np.float16)
        _, err = _assign(w, h, halves[:, 0].astype(np.float32), halves[:, 1].astype(np.float32))
        less = err < best
        best = np.where(less, err, best)
        alphas = np.where(less[:, None], halves, alphas)
    digits, _ = _assign(w, h, alphas[:, 0].astype(np.float32), alphas[:, 1].astype(np.float32))
    return digits.astype(np.uint8), alphas


def _fit_tp2_2(w: F32, h: F32 | None) -> tuple[U8, U8]:
    return trellis.fit_tp2_2(w, own_weights(np.abs(w)) if h is None else h)


FITS: dict[int, Callable[[F32, F32 | None], tuple[U8, NDArray[Any]]]] = {
    TP2_0.id: fit_tp2_0,
    TP2_1.id: fit_tp2_1,
    TP2_2.id: _fit_tp2_2,
}


def reference(t: TensorType, weights: F32, importance: F32 | None = None) -> U8:
    """weights float32 (R, C), importance float32 (C,) or None -> packed rows of type t."""
    rows, cols = weights.shape
    w = weights.reshape(-1, t.group)
    h = _group_importance(importance, rows, t.group)
    digits, scales = FITS[t.id](w, h)
    return pack(t, digits.reshape(rows, cols), scales.reshape(t.scale_shape(rows, cols)))
