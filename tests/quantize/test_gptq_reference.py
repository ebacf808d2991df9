"""Inner loops of calibrated quantization: native equals reference bit for bit, and both do what they are for."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ptqtp_gguf.codec import TensorType, native
from ptqtp_gguf.codec.tp2_0 import TP2_0
from ptqtp_gguf.codec.tp2_1 import LEVELS, TP2_1, scale_to_float
from ptqtp_gguf.codec.tp2_2 import CHAIN, TP2_2, digits_of_levels
from ptqtp_gguf.errors import QuantizeError
from ptqtp_gguf.quantize import trellis
from ptqtp_gguf.quantize.gptq_reference import (
    best_path,
    cd_block,
    factor,
    gptq_block,
    kbest_cd_block,
    kbest_gptq_block,
)
from ptqtp_gguf.quantize.methods import METHODS, quantize

KINDS = pytest.mark.parametrize("kind", [TP2_1, TP2_2], ids=lambda t: t.name)
Outcome = tuple[np.ndarray, np.ndarray, np.ndarray]


def matrix(a: np.ndarray) -> native.Matrix:
    return a.ctypes.data, a.strides[0] // a.itemsize


def padded(a: np.ndarray, pad: int) -> np.ndarray:
    """A copy of a whose rows lie `pad` elements further apart; 77 in between."""
    whole = np.full((len(a) + 1, a.shape[1] + pad), 77, a.dtype)
    whole[:-1, : a.shape[1]] = a
    return whole[:-1, : a.shape[1]]


def gptq(kind: TensorType, w: np.ndarray, u: np.ndarray, window: int) -> Outcome:
    """The reference of native.gptq_block."""
    return gptq_block(w, u, window) if kind == TP2_1 else kbest_gptq_block(w, u, window)


def descent(kind: TensorType, r: np.ndarray, h: np.ndarray, planes: Any, window: int) -> Outcome:
    """The reference of native.cd_block."""
    levels, codes = planes
    return (cd_block if kind == TP2_1 else kbest_cd_block)(r, h, levels, codes, window)


def run(
    what: str,
    x: np.ndarray,
    m: np.ndarray,
    planes: Any,
    window: int,
    pad: int = 0,
    threads: int = 1,
    kind: TensorType = TP2_1,
) -> Outcome:
    """native's block on padded copies. Fails where it writes between the rows or behind them."""
    rows, cols = x.shape
    outputs = [padded(a, pad) for a in (*planes, np.zeros_like(x))]
    inputs = [padded(a, pad) for a in (x, m)]
    getattr(native, what)(kind, rows, cols, *map(matrix, inputs), *map(matrix, outputs), window, threads)
    for a in (*inputs, *outputs):
        assert a.base is not None and (a.base[:, a.shape[1] :] == 77).all() and (a.base[-1] == 77).all()
    return outputs[0], outputs[1], outputs[2]


def no_planes(rows: int, cols: int) -> tuple[np.ndarray, np.ndarray]:
    return np.zeros((rows, cols), np.int8), np.zeros((rows, cols // 32), np.uint8)


def top(arrays: Any, rows: int) -> Any:
    return tuple(a[:rows] for a in arrays)


def assert_same(got: Outcome, want: Outcome) -> None:
    assert np.array_equal(got[0], want[0]) and np.array_equal(got[1], want[1])
    assert got[2].dtype == want[2].dtype == np.float32
    bits = got[2].view(np.uint32) == want[2].view(np.uint32)
    assert (bits | (np.isnan(got[2]) & np.isnan(want[2]))).all()  # the sign of zero included


def assert_both_same(
    kind: TensorType, x: np.ndarray, u: np.ndarray, h: np.ndarray, planes: Any, window: int, pad: int = 0
) -> None:
    found = run("gptq_block", x, u, no_planes(*x.shape), window, pad, kind=kind)
    assert_same(found, gptq(kind, x, u, window))
    assert valid(kind, found[0])
    changed = run("cd_block", x, h, planes, window, pad, kind=kind)
    assert_same(changed, descent(kind, x, h, planes, window))
    moved = (changed[0] != planes[0]).reshape(-1, 32).any(axis=1)
    assert kind == TP2_1 or valid(kind, changed[0].reshape(-1, 32)[moved])


def valid(kind: TensorType, levels: np.ndarray) -> bool:
    """Whether the type can hold levels (R, C), of TP2_2 in the order of the chain."""
    if kind == TP2_1:
        return bool(np.isin(levels, LEVELS).all())
    units = np.empty((levels.size // 32, 32), np.int8)
    units[:, CHAIN] = levels.reshape(-1, 32)
    return bool((digits_of_levels(units) <= 8).all())


def problem(rng: np.random.Generator, cols: int) -> tuple[np.ndarray, np.ndarray]:
    """H of correlated inputs, damped, and the upper factor of its inverse."""
    x = rng.normal(size=(4 * cols, cols // 2)) @ rng.normal(size=(cols // 2, cols)) + rng.normal(size=(4 * cols, cols))
    h = x.T @ x * np.outer(*[np.exp(0.5 * rng.normal(size=cols))] * 2) / len(x)
    h += 0.01 * np.mean(np.diag(h)) * np.eye(cols)
    return h.astype(np.float32), np.linalg.cholesky(np.linalg.inv(h)).T.astype(np.float32)


def weights(rng: np.random.Generator, rows: int, cols: int) -> np.ndarray:
    return (0.02 * rng.normal(size=(rows, cols))).astype(np.float32)


def values(levels: np.ndarray, codes: np.ndarray) -> np.ndarray:
    return np.repeat(scale_to_float(codes), 32, axis=1) * levels


def objective(w: np.ndarray, levels: np.ndarray, codes: np.ndarray, h: np.ndarray) -> np.ndarray:
    """e H e^T of each row, in float64."""
    e = w.astype(np.float64) - values(levels, codes)
    return np.einsum("rj,jk,rk->r", e, h.astype(np.float64), e)


def gradient(w: np.ndarray, levels: np.ndarray, codes: np.ndarray, h: np.ndarray) -> np.ndarray:
    return ((w.astype(np.float64) - values(levels, codes)) @ h).astype(np.float32)


# ---- native equals reference ----


@KINDS
@pytest.mark.parametrize(("cols", "window"), [(32, 0), (64, 3), (128, 2), (256, 1)])
def test_native_equals_reference(kind: TensorType, cols: int, window: int, rng: np.random.Generator) -> None:
    h, u = problem(rng, cols)
    w = weights(rng, 33, cols)
    first = gptq(kind, w, u, window)
    fits = gradient(w, *first[:2], h), first[:2]
    noise = rng.integers(-5, 6, w.shape, np.int8), first[1]
    starts = [fits, (gradient(w, *noise, h), noise)]
    ends = [descent(kind, r, h, planes, window) for r, planes in starts]
    assert valid(kind, first[0]) and valid(kind, ends[0][0])
    for rows, pad in ((1, 0), (15, 3), (16, 0), (17, 1), (33, 40)):
        got = run("gptq_block", w[:rows], u, no_planes(rows, cols), window, pad, kind=kind)
        assert_same(got, top(first, rows))
        for (r, planes), end in zip(starts, ends, strict=True):
            got = run("cd_block", r[:rows], h, top(planes, rows), window, pad, threads=3, kind=kind)
            assert_same(got, top(end, rows))


@pytest.mark.parametrize("pair", [(64, 67), (64, 75)])
def test_errors_are_summed_in_the_order_of_columns(pair: tuple[int, int], rng: np.random.Generator) -> None:
    """Weights of two values that two codes fit equally well: the rounding of the sums decides, so the order shows."""
    w = rng.permuted(np.repeat(np.float32(2**-11) * np.array(pair, np.float32), 16)[None].repeat(300, axis=0), axis=1)
    u = 0.7 * np.eye(32, dtype=np.float32)
    assert_same(run("gptq_block", w, u, no_planes(300, 32), 0), gptq(TP2_1, w, u, 0))


@KINDS
def test_bytes_do_not_depend_on_threads(kind: TensorType, rng: np.random.Generator) -> None:
    h, u = problem(rng, 32)
    w = weights(rng, 2000, 32)
    first = [run("gptq_block", w, u, no_planes(2000, 32), 1, kind=kind)]
    first.append(run("cd_block", gradient(w, *first[0][:2], h), h, first[0][:2], 1, kind=kind))
    for threads in (0, 2, 7):
        assert_same(run("gptq_block", w, u, no_planes(2000, 32), 1, 0, threads, kind), first[0])
        r = gradient(w, *first[0][:2], h)
        assert_same(run("cd_block", r, h, first[0][:2], 1, 0, threads, kind), first[1])


def odd_rows(rng: np.random.Generator, cols: int) -> np.ndarray:
    n, gauss = (1, cols), 0.02 * rng.normal(size=(1, cols))
    kinds = [
        gauss,
        gauss * 1e-20,
        gauss * 1e-40,
        gauss * 1e6,
        gauss * 1e36,
        np.where(gauss < 0, -0.0, 0.0),
        np.full(n, -0.3),
        0.01 * rng.choice(np.array(LEVELS), size=n),
        0.25 * rng.integers(-3, 4, size=n),
        gauss * 2.0 ** -rng.integers(0, 120, size=n),
        np.where(gauss > 0.03, 9, 1e-9),
        np.where(gauss > 0.05, np.nan, gauss),
        np.where(gauss > 0.05, -np.inf, gauss),
        np.full(n, np.nan),
    ]
    with np.errstate(over="ignore"):
        return np.concatenate(kinds).astype(np.float32)


@KINDS
@pytest.mark.parametrize("diagonal", [None, 0.0, -1.0, 1e-42, 1e-25, 1e30, np.nan, np.inf])
def test_native_equals_reference_on_odd_values(
    kind: TensorType, diagonal: float | None, rng: np.random.Generator
) -> None:
    h, u = problem(rng, 64)
    w = odd_rows(rng, 64)
    planes = rng.integers(-5, 6, w.shape, np.int8), rng.choice(np.array([0, 1, 128, 254, 255], np.uint8), (len(w), 2))
    if diagonal is not None:
        for m in (h, u):
            m[[0, 5, 31, 40], [0, 5, 31, 40]] = diagonal
    assert_both_same(kind, w, u, h, planes, 2)


wild = st.floats(width=32) | st.floats(-1, 1, width=32) | st.sampled_from([0.0, -0.0, 1e-44, 0.5, 9.6875, 3e38])


@KINDS
@given(
    hnp.arrays(np.float32, (3, 64), elements=wild),
    hnp.arrays(np.float32, 64, elements=wild),
    hnp.arrays(np.uint8, (3, 2)),
    hnp.arrays(np.int8, (3, 64), elements=st.integers(-5, 5)),
    st.integers(0, 3),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=40, deadline=None)
def test_native_equals_reference_on_any_values(
    kind: TensorType, x: np.ndarray, diagonal: np.ndarray, codes: np.ndarray, levels: np.ndarray, window: int, seed: int
) -> None:
    m = np.triu(np.random.default_rng(seed).normal(size=(64, 64)).astype(np.float32), 1)
    np.fill_diagonal(m, diagonal)
    assert_both_same(kind, x, m, m, (levels, codes), window, pad=seed % 3)


# ---- what they are for ----


@KINDS
def test_errors_of_gptq_are_the_objective(kind: TensorType, rng: np.random.Generator) -> None:
    """E H E^T = err err^T if H^-1 = U^T U and err = E U^-1: true only if every weight got all of its feedback."""
    h, u = problem(rng, 128)
    w = weights(rng, 40, 128)
    levels, codes, err = run("gptq_block", w, u, no_planes(40, 128), 2, kind=kind)
    assert np.allclose((err.astype(np.float64) ** 2).sum(axis=1), objective(w, levels, codes, h), rtol=2e-3)


def test_gptq_is_better_than_search(rng: np.random.Generator) -> None:
    h, u = problem(rng, 128)
    w = weights(rng, 200, 128)
    e = (native.dequantize(TP2_1, quantize(TP2_1, METHODS["search"], w)) - w).astype(np.float64)
    plain = np.einsum("rj,jk,rk->", e, h, e)
    sums = [objective(w, *gptq(TP2_1, w, u, window)[:2], h).sum() for window in (0, 2)]
    assert sums[1] < sums[0] < 0.4 * plain
    chained = objective(w, *run("gptq_block", w, u, no_planes(200, 128), 1, kind=TP2_2)[:2], h).sum()
    assert chained < 0.8 * sums[1]


def test_survivors_without_correlation_are_the_search(rng: np.random.Generator) -> None:
    """Nothing is fed back: the best path is that of the trellis' search."""
    w = weights(rng, 50, 32)
    eye, s, ones = np.eye(32, dtype=np.float32), np.full(50, 2.0**-7, np.float32), np.ones_like(w)
    start = trellis.best_start(w, ones, s)
    levels, _, cost = best_path(w, eye, s, start)
    ends, _ = trellis.lap(w, ones, s, trellis._only(start))
    assert np.allclose(cost, ends[np.arange(50), 8 - start]) and valid(TP2_2, levels.astype(np.int8))


def test_factor(rng: np.random.Generator) -> None:
    h, _ = problem(rng, 32)
    u = factor(h).astype(np.float64)
    assert np.array_equal(u, np.triu(u)) and np.allclose(u.T @ u @ h, np.eye(32), atol=1e-4)
    h[:, 5] = h[5] = 0  # no power: left out, and the others are as without it
    u = factor(h).astype(np.float64)
    rest = np.delete(np.arange(32), 5)
    assert not u[5].any() and not u[:, 5].any()
    assert np.allclose((u.T @ u @ h)[np.ix_(rest, rest)], np.eye(31), atol=1e-4)


@pytest.mark.parametrize(("kind", "windows"), [(TP2_1, (0, 1, 2, 4)), (TP2_2, (0, 1, 2))])
def test_a_wider_window_never_costs_more_in_the_first_group(
    kind: TensorType, windows: tuple[int, ...], rng: np.random.Generator
) -> None:
    """Later groups start from other values, so only there it is a rule; with TP2_1 for the greedy part alone."""
    _, u = problem(rng, 32)
    w = weights(rng, 300, 32)
    costs = []
    for window in windows:
        found = (
            gptq_block(w, u, window)
            if kind == TP2_1
            else run("gptq_block", w, u, no_planes(300, 32), window, kind=kind)
        )
        costs.append(np.add.accumulate(found[2] * found[2], axis=1)[:, -1])
    assert all((a >= b * (1 - 1e-6)).all() for a, b in itertools.pairwise(costs))
    assert (costs[0] > costs[2]).mean() > 0.1


@KINDS
def test_two_blocks_are_one(kind: TensorType, rng: np.random.Generator) -> None:
    """The caller hands errors on between blocks; a block does so between its groups."""
    _, u = problem(rng, 128)
    w = weights(rng, 50, 128)
    one = run("gptq_block", w, u, no_planes(50, 128), 2, kind=kind)
    left = run("gptq_block", w[:, :64], u[:64, :64], no_planes(50, 64), 2, kind=kind)
    rest = w[:, 64:] - left[2] @ u[:64, 64:]
    right = run("gptq_block", rest, u[64:, 64:], no_planes(50, 64), 2, kind=kind)
    assert np.array_equal(left[0], one[0][:, :64])
    assert (right[0] == one[0][:, 64:]).mean() > 0.99  # sums in another order


@KINDS
def test_descent_never_raises_the_objective(kind: TensorType, rng: np.random.Generator) -> None:
    h, u = problem(rng, 128)
    w = weights(rng, 60, 128)
    starts = [no_planes(60, 128), run("gptq_block", w, u, no_planes(60, 128), 2, kind=kind)[:2]]
    starts.append((starts[1][0], (starts[1][1] + 9).astype(np.uint8)))  # scales far off
    ends = []
    for planes in starts:
        before = objective(w, *planes, h)
        for _ in range(4):
            levels, codes, delta = run("cd_block", gradient(w, *planes, h), h, planes, 2, kind=kind)
            after = objective(w, levels, codes, h)
            assert (after <= before * (1 + 1e-6)).all() and valid(kind, levels)
            assert np.array_equal(delta, values(levels, codes) - values(*planes))
            planes, before = (levels, codes), after
        ends.append(before.sum())
    assert ends[1] < 0.9 * objective(w, *starts[1], h).sum()
    assert ends[2] < 0.7 * objective(w, *starts[2], h).sum()


def test_descent_without_correlation_rounds_to_nearest(rng: np.random.Generator) -> None:
    h = np.diag(rng.uniform(0.5, 2, 64)).astype(np.float32)
    w = weights(rng, 30, 64)
    codes = np.full((30, 2), 140, np.uint8)
    levels, same, _ = run("cd_block", w * np.diagonal(h), h, (np.zeros((30, 64), np.int8), codes), 0)
    distance = np.abs(w[..., None] - values(np.ones_like(levels), codes)[..., None] * np.array(LEVELS))
    chosen = np.abs(w - values(levels, codes))
    assert np.array_equal(same, codes) and np.allclose(chosen, distance.min(axis=-1), atol=1e-8)


def test_descent_at_its_end_stays(rng: np.random.Generator) -> None:
    h, _ = problem(rng, 64)
    planes = rng.choice(np.array(LEVELS, np.int8), (20, 64)), rng.integers(100, 160, (20, 2)).astype(np.uint8)
    r = np.zeros((20, 64), np.float32)  # the weights are met exactly
    levels, codes, delta = run("cd_block", r, h, planes, 2)
    assert np.array_equal(levels, planes[0]) and np.array_equal(codes, planes[1]) and not delta.any()


# ---- what is refused ----


@pytest.mark.parametrize("what", ["gptq_block", "cd_block"])
def test_wrong_sizes_are_refused(what: str) -> None:
    x, m = np.zeros((2, 320), np.float32), np.eye(320, dtype=np.float32)
    planes = no_planes(2, 320)
    for cols, window in ((33, 2), (288, 2), (64, -1), (64, 256)):
        with pytest.raises(
            QuantizeError, match=rf"TP2_1, 2 x {cols}, window {window}: columns no multiple of 32 or above 256"
        ):
            getattr(native, what)(TP2_1, 2, cols, matrix(x), matrix(m), *map(matrix, planes), matrix(x.copy()), window)
    with pytest.raises(QuantizeError, match="rows that overlap"):
        getattr(native, what)(TP2_2, 2, 64, (x.ctypes.data, 63), matrix(m), *map(matrix, planes), matrix(x.copy()))
    with pytest.raises(QuantizeError, match="TP2_0, 2 x 64, window 2: not a trit-plane type"):
        getattr(native, what)(TP2_0, 2, 64, matrix(x), matrix(m), *map(matrix, planes), matrix(x.copy()))
