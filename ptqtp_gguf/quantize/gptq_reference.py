"""The inner loops of calibrated quantization, over one block of columns: the readable form.

native.gptq_block and native.cd_block (native/bulk/calibrate.inc) do the same arithmetic in the same order and are
what is used; the suite holds both together bit for bit. The matrix products between blocks are the caller's.

H (C, C) is the sum over calibration tokens of x x^T, x the input of a linear layer. A weight is level * s, level in
{0, +-1, +-2, +-3, +-5}, s the scale of an 8-bit code, one code a group of 32 columns. All is float32; every sum runs
column after column; products are rounded before they are added.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ..codec import F32, TP2_1, U8, scale_to_float
from .search import best_code, nearest_level
from .sums import ordered_sum

I8 = NDArray[np.int8]

GROUP = TP2_1.group


def window_codes(code: U8, window: int) -> Iterator[U8]:
    """code (R,), then those around it: -1, +1, -2, +2 ... -window, +window, clipped to 0..255."""
    yield code
    for far in range(1, window + 1):
        for step in (-far, far):
            yield np.clip(code.astype(np.int64) + step, 0, 255).astype(np.uint8)


def _nearest(v: F32, s: F32) -> F32:
    """The levels nearest to v (R,) at scales s (R,); ties to the smaller, NaN to 0."""
    level = nearest_level(np.abs(v)[:, None], s)[:, 0]
    return np.where(v < 0, -level, level).astype(np.float32)


def _lose(x: F32, moved: F32, row: F32) -> F32:
    """x (R, K) - moved (R,) * row (K,)."""
    return x - moved[:, None] * row


def gptq_block(w: F32, u: F32, window: int = 2) -> tuple[I8, U8, F32]:
    """Quantize a block with GPTQ's feedback.

    w       (R, C), C a multiple of 32
    u       (C, C), this block of the upper U with inv(H) = U^T U; only its upper triangle is read
    window  scale codes tried to each side of the one that fits the group best before any feedback
    returns levels int8 (R, C), codes uint8 (R, C/32), err float32 (R, C): what later blocks lose times their part of u
    A column whose u_jj is not > 0 feeds nothing back and has no say in the code.
    """
    rows, cols = w.shape
    v = w.copy()
    levels, err = np.zeros((rows, cols), np.int8), np.zeros((rows, cols), np.float32)
    codes = np.zeros((rows, cols // GROUP), np.uint8)
    with np.errstate(all="ignore"):
        diag = np.diagonal(u)
        weight = np.where(diag > 0, np.float32(1) / (diag * diag), np.float32(0))
        for g in range(cols // GROUP):
            here = slice(g * GROUP, (g + 1) * GROUP)
            first = best_code(np.abs(v[:, here]), np.broadcast_to(weight[here], (rows, GROUP)), ordered_sum)
            best = np.full(rows, np.inf, np.float32)
            for n, code in enumerate(window_codes(first, window)):
                level, e = _gptq_group(v[:, here], u[here, here], scale_to_float(code))
                cost = ordered_sum(e * e)
                take = (cost < best) | (n == 0)  # the first stays where no cost is a number
                best = np.where(cost < best, cost, best)
                levels[take, here], err[take, here], codes[take, g] = level[take], e[take], code[take]
            for j in range(here.start, here.stop):
                v[:, here.stop :] = _lose(v[:, here.stop :], err[:, j], u[j, here.stop :])
    return levels, codes, err


def _gptq_group(v: F32, u: F32, s: F32) -> tuple[F32, F32]:
    """One group v (R, 32) at scales s (R,): levels, and errors over u_jj."""
    v, level, e = v.copy(), np.zeros_like(v), np.zeros_like(v)
    for j in range(GROUP):
        level[:, j] = _nearest(v[:, j], s)
        if u[j, j] > 0:
            e[:, j] = (v[:, j] - s * level[:, j]) / u[j, j]
        v[:, j + 1 :] = _lose(v[:, j + 1 :], e[:, j], u[j, j + 1 :])
    return level, e


def cd_block(r: F32, h: F32, levels: I8, codes: U8, window: int = 2) -> tuple[I8, U8, F32]:
    """A sweep of coordinate descent on tr(E H E^T), E = W - levels * scales.

    r       (R, C), this block's columns of E H; C a multiple of 32
    h       (C, C), this block of H, symmetric; only its upper triangle is read
    levels  int8 (R, C), codes uint8 (R, C/32): the present ones
    window  scale codes tried to each side of the present one
    returns levels, codes, delta float32 (R, C): the change of levels * scales, by which E H is to be updated
    A group changes only where that lowers the objective. A column whose h_jj is not > 0 keeps its level.
    """
    rows, cols = r.shape
    r, levels, codes, delta = r.copy(), levels.copy(), codes.copy(), np.zeros((rows, cols), np.float32)
    with np.errstate(all="ignore"):
        for g in range(cols // GROUP):
            here = slice(g * GROUP, (g + 1) * GROUP)
            before, best = levels[:, here].astype(np.float32), np.zeros(rows, np.float32)
            present = codes[:, g].copy()
            q = scale_to_float(present)[:, None] * before
            for code in window_codes(present, window):
                level, d, change = _cd_group(r[:, here], h[here, here], before, q, scale_to_float(code))
                less = change < best
                best = np.where(less, change, best)
                levels[less, here], delta[less, here], codes[less, g] = level[less], d[less], code[less]
            for j in range(here.start, here.stop):
                r[:, here.stop :] = _lose(r[:, here.stop :], delta[:, j], h[j, here.stop :])
    return levels, codes, delta


def _cd_group(r: F32, h: F32, level: F32, q: F32, s: F32) -> tuple[F32, F32, F32]:
    """One group at scales s (R,): levels (R, 32), their moves, the change of the objective (R,)."""
    r, level, d, terms = r.copy(), level.copy(), np.zeros_like(r), np.zeros_like(r)
    for j in range(GROUP):
        if h[j, j] > 0:
            level[:, j] = _nearest(q[:, j] + r[:, j] / h[j, j], s)
        d[:, j] = s * level[:, j] - q[:, j]
        terms[:, j] = d[:, j] * (d[:, j] * h[j, j] - np.float32(2) * r[:, j])
        r[:, j + 1 :] = _lose(r[:, j + 1 :], d[:, j], h[j, j + 1 :])  # columns up to j are not looked at again
    return level, d, ordered_sum(terms)
