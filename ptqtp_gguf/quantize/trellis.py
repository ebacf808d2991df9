"""`search` for TP2_2: the best closed path through its trellis, at the best of 13 scale codes.

The readable form of native/quantize/trellis.inc: the same arithmetic in the same order, so the bytes are equal.

A weight x at scale s costs h * e^2, e its distance from the nearest of s * (o - 3), s * o, s * (o + 3), where
o = 2*t2 + p: the first trit is free, the others follow the path. h is the importance, or 2 mean|w| + |w| (search.py).
Codes are tried around max|w|/6, and that of max|w|/2: levels -2..2 are free of the chain, so ternary weights are
exact. A code is ranked by the least cost of a lap that starts from the end of another one, its sign changed; at
the best code each state in turn is the start and, its sign changed, the end: exact tail-biting. On Gaussian, Laplace
and Student-t5 weights that is within .2 % of the error of exact tail-biting at every code (docs/results/trellis.md).
"""

from __future__ import annotations

import numpy as np

from ..codec import CHAIN, F32, I64, THIRD_OF_SUM, U8, scale_from_float, scale_to_float

STEPS = (1, 0, 2, 3, -1, 4, -2, 5, -3, 6, -4, 7)  # codes from that of max|w|/6 on; the first of equals wins
STATES = 9  # 3 * (t2[-2] + 1) + t2[-1] + 1; of a chain's end with the sign changed, 8 less
LIGHT = np.float32(2**-10)  # the least h, of about 1: a weight that counted for nothing would get any level
LARGE = np.float32(1e38)  # the cost of a state that a path may not start from

# OFFSET[before2, before, t], all 0..2: 2 * t2 + p, counted from -3
_TRIT = np.arange(3)
OFFSET = 2 * _TRIT[None, None, :] + THIRD_OF_SUM[_TRIT[:, None, None] + _TRIT[None, :, None]] + 1


def _costs(x: F32, h: F32, s: F32) -> F32:
    """Costs (N, 7) of one weight of each group at offsets -3..3."""
    offset = np.arange(-3, 4, dtype=np.float32) * s[:, None]
    e = np.abs(x[:, None] - offset)
    e = np.minimum(e, np.abs(e - offset[:, -1:]))
    return np.asarray(e * e * h[:, None], np.float32)


def lap(x: F32, h: F32, s: F32, path: F32) -> tuple[F32, U8]:
    """x, h (N, 32) along the chain, s (N,), path (N, 9): costs at the start -> costs at the end, and (32, N, 9) the
    trit two before, 0..2, on the best way to each state."""
    came = np.empty((x.shape[1], len(x), STATES), np.uint8)
    for c in range(x.shape[1]):
        costs = _costs(x[:, c], h[:, c], s)
        ways = path.reshape(-1, 3, 3, 1) + costs[:, OFFSET]  # (N, before2, before, t)
        came[c] = ways.argmin(axis=1).reshape(-1, STATES)
        path = ways.min(axis=1).reshape(-1, STATES)
    return path, came


def _rank(x: F32, h: F32, s: F32) -> F32:
    first, _ = lap(x, h, s, np.zeros((len(x), STATES), np.float32))
    second, _ = lap(x, h, s, (first - first.min(axis=1, keepdims=True))[:, ::-1])
    return np.asarray(second.min(axis=1), np.float32)


def _only(start: I64) -> F32:
    path = np.full((len(start), STATES), LARGE, np.float32)
    path[np.arange(len(start)), start] = 0
    return path


def best_start(x: F32, h: F32, s: F32) -> I64:
    """The start (N,) of the cheapest closed path; the first of equals."""
    ends = [lap(x, h, s, _only(np.full(len(x), start)))[0][:, STATES - 1 - start] for start in range(STATES)]
    start: I64 = np.argmin(np.stack(ends, axis=1), axis=1)
    return start


def trace(x: F32, s: F32, start: I64, came: U8) -> U8:
    """Digits (N, 32) along the chain, the way back from its end."""
    each = np.arange(len(x))
    state = STATES - 1 - start
    digits = np.empty(x.shape, np.uint8)
    for c in range(x.shape[1] - 1, -1, -1):
        before2, before, t = came[c, each, state].astype(np.int64), state // 3, state % 3
        v = x[:, c] - (OFFSET[before2, before, t] - 3).astype(np.float32) * s
        e = np.abs(v)
        t1 = np.where(np.abs(e - np.float32(3) * s) < e, np.where(v < 0, -1, 1), 0)
        digits[:, c] = 3 * (t1 + 1) + t
        state = 3 * before2 + before
    return digits


def near_one(h: F32) -> F32:
    """h (N, 32) times the power of two that takes a group's largest near 1, so that costs neither vanish nor overflow;
    at least LIGHT, 1 where all are 0."""
    heaviest = h.max(axis=1, keepdims=True)
    exponent = heaviest.view(np.uint32) >> 23
    unit = (np.where(exponent < 253, 254 - exponent, 1).astype(np.uint32) << 23).view(np.float32)
    return np.where(heaviest > 0, np.maximum(h * unit, LIGHT), np.float32(1))


def best_code(x: F32, h: F32) -> U8:
    """The code (N,) of the best rank for x, h (N, 32) along the chain; the first of equals, 0 for a group of zeros."""
    top = np.abs(x).max(axis=1)
    middle = scale_from_float(top / np.float32(6)).astype(np.int64)
    tries = [np.clip(middle + step, 0, 255).astype(np.uint8) for step in STEPS]
    tries.append(scale_from_float(top / np.float32(2)))
    best, code = np.full(len(x), np.finfo(np.float32).max, np.float32), tries[0]
    for tried in tries:
        rank = _rank(x, h, scale_to_float(tried))
        less = rank < best
        best, code = np.where(less, rank, best), np.where(less, tried, code)
    return np.where(top > 0, code, np.uint8(0))


def fit_tp2_2(w: F32, h: F32) -> tuple[U8, U8]:
    """w, h (N, 32) -> digits (N, 32), scale codes (N,)."""
    x, h = w[:, CHAIN], near_one(h)[:, CHAIN]
    codes = best_code(x, h)
    s = scale_to_float(codes)
    start = best_start(x, h, s)
    _, came = lap(x, h, s, _only(start))
    digits = np.empty(w.shape, np.uint8)
    digits[:, CHAIN] = trace(x, s, start, came)
    return digits, codes
