"""The inner loops of calibrated quantization, over one block of columns: the readable form.

native.gptq_block and native.cd_block (native/bulk/calibrate.inc, kbest.inc) do the same arithmetic in the same order
and are what is used; the suite holds both together bit for bit. The matrix products between blocks are the caller's.

    type    GPTQ                                      descent
    TP2_1   gptq_block: greedy                        cd_block: column by column
    TP2_2   kbest_gptq_block: nine survivors          kbest_cd_block: a group at a time

quantize/cuda/calibrate.cu does the same.

H (C, C) is the sum over calibration tokens of x x^T, x the input of a linear layer. A weight is level * s, s the scale
of an 8-bit code, one code a group of 32 columns. All is float32; every sum runs column after column; products are
rounded before they are added.

K-best ("per-survivor processing"): a path is a choice of levels for the columns so far. Nine survive each step: to
every pair of last second trits (a state of TP2_2's trellis, codec/tp2_2.py) the cheapest one, each with the feedback of
its own levels. Of the first trit only the best value counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from ..codec import F32, F64, I64, TP2_1, U8, scale_to_float
from . import trellis
from .search import best_code, nearest_level
from .sums import ordered_sum
from .trellis import OFFSET, STATES, best_start, near_one

I8 = NDArray[np.int8]

GROUP = TP2_1.group
LIMIT = np.float32(32768)  # of values that the trellis' search looks at


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
    """Quantize a block to TP2_1 with GPTQ's feedback, each weight to its nearest level.

    w       (R, C), C a multiple of 32
    u       (C, C), this block of the upper U with inv(H) = U^T U; only its upper triangle is read
    window  scale codes tried to each side of the one that fits the group best before any feedback
    returns levels int8 (R, C), codes uint8 (R, C/32), err float32 (R, C): what later blocks lose times their part of u
    A column whose u_jj is not > 0 feeds nothing back and has no say in the code.
    """
    return _by_groups(_greedy_group, w, u, window)


Tried = tuple[F32, F32, F32]  # a group at one code: levels (R, 32), errors over u_jj (R, 32), costs (R,)
Found = tuple[F32, U8, F32, F32]  # the best of some: levels, codes (R,), errors over u_jj, costs


def _by_groups(quantize: Callable[[F32, F32, int], Found], w: F32, u: F32, window: int) -> tuple[I8, U8, F32]:
    """Group by group, what each moves handed on to those that come."""
    rows, cols = w.shape
    v = w.copy()
    levels, err = np.zeros((rows, cols), np.int8), np.zeros((rows, cols), np.float32)
    codes = np.zeros((rows, cols // GROUP), np.uint8)
    with np.errstate(all="ignore"):
        for g in range(cols // GROUP):
            here = slice(g * GROUP, (g + 1) * GROUP)
            levels[:, here], codes[:, g], err[:, here], _ = quantize(v[:, here], u[here, here], window)
            for j in range(here.start, here.stop):
                v[:, here.stop :] = _lose(v[:, here.stop :], err[:, j], u[j, here.stop :])
    return levels, codes, err


def _weight(u: F32) -> F32:
    """What a squared error costs at each column."""
    diag = np.diagonal(u)
    return np.where(diag > 0, np.float32(1) / (diag * diag), np.float32(0))


def _best_of(codes: Iterable[U8], attempt: Callable[[U8], Tried]) -> Found:
    """The cheapest of some codes, the first of equals; the first of all where no cost is a number."""
    found: Found | None = None
    for code in codes:
        level, e, cost = attempt(code)
        if found is None:
            found = level, code, e, np.where(cost < np.inf, cost, np.float32(np.inf))
        else:
            found = _cheaper(found, (level, code, e, cost))
    assert found
    return found


def _cheaper(found: Found, other: Found) -> Found:
    """By row the other where it costs less."""
    less = other[3] < found[3]
    level, e = (np.where(less[:, None], other[i], found[i]) for i in (0, 2))
    return level, np.where(less, other[1], found[1]), e, np.where(less, other[3], found[3])


def _greedy_group(v: F32, u: F32, window: int) -> Found:
    first = best_code(np.abs(v), np.broadcast_to(_weight(u), v.shape), ordered_sum)
    return _best_of(window_codes(first, window), lambda code: _gptq_group(v, u, scale_to_float(code)))


def _gptq_group(v: F32, u: F32, s: F32) -> Tried:
    """One group v (R, 32) at scales s (R,)."""
    v, level, e = v.copy(), np.zeros_like(v), np.zeros_like(v)
    for j in range(GROUP):
        level[:, j] = _nearest(v[:, j], s)
        if u[j, j] > 0:
            e[:, j] = (v[:, j] - s * level[:, j]) / u[j, j]
        v[:, j + 1 :] = _lose(v[:, j + 1 :], e[:, j], u[j, j + 1 :])
    return level, e, ordered_sum(e * e)


def cd_block(r: F32, h: F32, levels: I8, codes: U8, window: int = 2) -> tuple[I8, U8, F32]:
    """A sweep of coordinate descent on tr(E H E^T), E = W - levels * scales, of TP2_1.

    r       (R, C), this block's columns of E H; C a multiple of 32
    h       (C, C), this block of H, symmetric; only its upper triangle is read
    levels  int8 (R, C), codes uint8 (R, C/32): the present ones
    window  scale codes tried to each side of the present one
    returns levels, codes, delta float32 (R, C): the change of levels * scales, by which E H is to be updated
    A group changes only where that lowers the objective. A column whose h_jj is not > 0 keeps its level.
    """

    def moves(r: F32, h: F32, before: F32, q: F32) -> Callable[[F32], Moved]:
        return lambda s: _cd_group(r, h, before, q, s)

    return _sweep(moves, r, h, levels, codes, window)


Moved = tuple[F32, F32, F32]  # a group at one code: levels (R, 32), their moves (R, 32), the objective's change (R,)


def _sweep(
    moves: Callable[[F32, F32, F32, F32], Callable[[F32], Moved]], r: F32, h: F32, levels: I8, codes: U8, window: int
) -> tuple[I8, U8, F32]:
    """Group by group, the codes around the present one, kept where the objective falls. moves: what a group (its r and
    h, its levels and what they stand for) does at scales (R,)."""
    rows, cols = r.shape
    r, levels, codes, delta = r.copy(), levels.copy(), codes.copy(), np.zeros((rows, cols), np.float32)
    with np.errstate(all="ignore"):
        for g in range(cols // GROUP):
            here = slice(g * GROUP, (g + 1) * GROUP)
            before, best = levels[:, here].astype(np.float32), np.zeros(rows, np.float32)
            present = codes[:, g].copy()
            move = moves(r[:, here], h[here, here], before, scale_to_float(present)[:, None] * before)
            for code in window_codes(present, window):
                level, d, change = move(scale_to_float(code))
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


# ---- K-best ----


def kbest_gptq_block(w: F32, u: F32, window: int) -> tuple[I8, U8, F32]:
    """As gptq_block, of TP2_2, with nine survivors; columns in the order of the chain."""
    return _by_groups(_chain_group, w, u, window)


def _chain_group(v: F32, u: F32, window: int) -> Found:
    x, h = _bounded(v), _importance(u, len(v))

    def attempt(code: U8) -> Tried:
        s = scale_to_float(code)
        return best_path(v, u, s, best_start(x, h, s))

    return _best_of(window_codes(trellis.best_code(x, h), window), attempt)


def _bounded(v: F32) -> F32:
    return np.where(np.isnan(v), np.float32(0), np.clip(v, -LIMIT, LIMIT))


def _importance(u: F32, rows: int) -> F32:
    """(R, 32): 1 / u_jj^2, a group's largest near 1."""
    return np.broadcast_to(near_one(np.minimum(_weight(u), np.finfo(np.float32).max)[None]), (rows, GROUP))


def best_path(x: F32, u: F32, s: F32, start: I64) -> Tried:
    """The best of nine survivors for groups x (R, 32) at scales s (R,).

    u       (32, 32), upper, inv(H) of the group = U^T U
    start   states (R,); the path ends in 8 less each
    returns levels (R, 32), (value - level * s) / u_jj (R, 32), the sum of their squares (R,)
    The first two steps begin in the start, whatever the values are, so that the path always closes.
    """
    each, three, weight = np.arange(len(x))[:, None], np.float32(3) * s, _weight(u)
    new = np.arange(STATES)
    before, t = new // 3, new % 3
    value = np.repeat(x[:, None, :], STATES, axis=1)  # (R, 9, 32): of the columns to come
    path = np.zeros((len(x), STATES), np.float32)
    level = np.empty((GROUP, len(x), STATES), np.float32)
    moved, came = np.zeros_like(level), np.empty(level.shape, np.int64)
    forced = start // 3, start % 3
    for j in range(GROUP):
        ways = []
        for before2 in range(3):
            v, o = value[:, 3 * before2 + before, j], (OFFSET[before2, before, t] - 3).astype(np.float32)
            e = np.abs(v - o * s[:, None])
            e = np.minimum(e, np.abs(e - three[:, None]))
            ways.append(path[:, 3 * before2 + before] + e * e * weight[j])
        second = ways[1] < ways[0]
        last = ways[2] < np.where(second, ways[1], ways[0])
        came[j] = np.where(last, 2, second.astype(np.int64)) if j > 1 else forced[j][:, None]
        path = np.choose(came[j], ways)
        value = value[each, 3 * came[j] + before]
        v, o = value[:, :, j], (OFFSET[came[j], before, t] - 3).astype(np.float32)
        e = v - s[:, None] * o
        a = np.abs(e)
        far = np.abs(a - three[:, None]) < a
        level[j] = o + np.where(far, np.where(e < 0, np.float32(-3), np.float32(3)), np.float32(0))
        if u[j, j] > 0:
            moved[j] = (v - s[:, None] * level[j]) / u[j, j]
        value[:, :, j + 1 :] = value[:, :, j + 1 :] - moved[j][:, :, None] * u[j, j + 1 :]
    state = STATES - 1 - start
    cost = path[each[:, 0], state]
    levels, err = np.empty_like(x), np.empty_like(x)
    for j in range(GROUP - 1, -1, -1):
        levels[:, j], err[:, j] = level[j, each[:, 0], state], moved[j, each[:, 0], state]
        state = 3 * came[j, each[:, 0], state] + state // 3
    return levels, err, cost


def factor(h: F32) -> F32:
    """The upper U with inv(H) = U^T U of a symmetric block (32, 32), of which the upper triangle is read; in float64.

    H = V V^T, V upper, U = inv(V). A column whose pivot is not > 0 is left out: its row of U is 0.
    """
    n = len(h)
    v, u = np.zeros((n, n)), np.zeros((n, n))
    for j in range(n - 1, -1, -1):
        x: F64 = h[: j + 1, j].astype(np.float64)
        for k in range(j + 1, n):
            x = x - v[: j + 1, k] * v[j, k]
        if x[j] > 0:
            v[j, j] = np.sqrt(x[j])
            v[:j, j] = x[:j] / v[j, j]
    for i in range(n - 1, -1, -1):
        if v[i, i] > 0:
            x = (np.arange(n) == i).astype(np.float64)
            for k in range(i + 1, n):
                x = x - v[i, k] * u[k]
            u[i, i:] = x[i:] / v[i, i]
    return u.astype(np.float32)


def kbest_cd_block(r: F32, h: F32, levels: I8, codes: U8, window: int) -> tuple[I8, U8, F32]:
    """As cd_block, of TP2_2, columns in the order of the chain: a group goes to its best path at the values that would
    be best for it, the rest as it is, where that lowers the objective."""

    def moves(r: F32, h: F32, before: F32, q: F32) -> Callable[[F32], Moved]:
        u = factor(h)
        target = q + _times_inverse(r, u)
        x, importance = _bounded(target), _importance(u, len(r))

        def move(s: F32) -> Moved:
            level, _, _ = best_path(target, u, s, best_start(x, importance, s))
            d = s[:, None] * level - q
            return level, d, _change(r, h, d)

        return move

    return _sweep(moves, r, h, levels, codes, window)


def _times_inverse(r: F32, u: F32) -> F32:
    """r U^T U, r (R, 32)."""
    y, out = np.zeros_like(r), np.zeros_like(r)
    for j in range(GROUP):
        for k in range(j, GROUP):
            y[:, j] += r[:, k] * u[j, k]
    for k in range(GROUP):
        for j in range(k + 1):
            out[:, k] += y[:, j] * u[j, k]
    return out


def _change(r: F32, h: F32, d: F32) -> F32:
    """What moves d (R, 32) do to the objective (R,)."""
    r, terms = r.copy(), np.zeros_like(r)
    for j in range(GROUP):
        terms[:, j] = d[:, j] * (d[:, j] * h[j, j] - np.float32(2) * r[:, j])
        r[:, j + 1 :] = _lose(r[:, j + 1 :], d[:, j], h[j, j + 1 :])
    return ordered_sum(terms)
