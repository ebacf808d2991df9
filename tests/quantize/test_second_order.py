"""Second order in numpy and the native core: its factor, its moments, and GPTQ as the textbook has it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from ptqtp_gguf.calibrate.store import unpacked
from ptqtp_gguf.codec import TensorType, native, weights_of_levels
from ptqtp_gguf.codec.tp2_1 import TP2_1, scale_to_float
from ptqtp_gguf.codec.tp2_2 import CHAIN, TP2_2
from ptqtp_gguf.errors import QuantizeError
from ptqtp_gguf.quantize.gptq import WINDOWS
from ptqtp_gguf.quantize.gptq_reference import gptq_block, kbest_gptq_block
from ptqtp_gguf.quantize.second_order import (
    Levels,
    SecondOrder,
    calibrate,
    chain_order,
    factor,
    prepared,
    shrinkage,
)

KINDS = pytest.mark.parametrize("kind", [TP2_1, TP2_2], ids=lambda t: t.name)
GPTQ = SecondOrder(passes=0)


def moments(rng: np.random.Generator, cols: int, tokens: int = 0) -> np.ndarray:
    """Second moments of correlated inputs of unequal size; of 4 * cols tokens unless told."""
    tokens = tokens or 4 * cols
    x = rng.normal(size=(tokens, max(1, cols // 2))) @ rng.normal(size=(max(1, cols // 2), cols))
    x = (x + rng.normal(size=(tokens, cols))) * np.exp(0.5 * rng.normal(size=cols))
    return (x.T @ x).astype(np.float32)


def weights(rng: np.random.Generator, rows: int, cols: int) -> np.ndarray:
    return (0.05 * rng.normal(size=(rows, cols))).astype(np.float32)


def problem(rng: np.random.Generator, kind: TensorType, rows: int, cols: int) -> tuple[np.ndarray, np.ndarray]:
    """w and prepared H in weight order."""
    return weights(rng, rows, cols), prepared(moments(rng, cols), 4 * cols, SecondOrder())


def in_weight_order(
    kind: TensorType, w: np.ndarray, h: np.ndarray, how: SecondOrder | None = None, threads: int = 1
) -> Levels:
    """As a caller does it: columns go along the chain, levels come back."""
    order = chain_order(kind, w.shape[1])
    h = h[order][:, order]
    made = calibrate(kind, w[:, order], h, factor(h), how, threads)
    levels = np.empty_like(made.levels)
    levels[:, order] = made.levels
    return Levels(levels, made.codes)


def cost(w: np.ndarray, h: np.ndarray, found: Levels) -> np.ndarray:
    """e H eT of each row, in float64."""
    scales = scale_to_float(found.codes).astype(np.float64).repeat(32, axis=1)
    e = w - scales * found.levels
    return np.asarray(((e @ h.astype(np.float64)) * e).sum(axis=1))


def off_factor(v: np.ndarray, h: np.ndarray) -> np.ndarray:
    v = v.astype(np.float64)
    return np.asarray(v @ v.T - h)


# ---- factor ----


@pytest.mark.parametrize("cols", [1, 32, 45, 96, 128, 130, 160, 288, 384])
def test_factor(cols: int, rng: np.random.Generator) -> None:
    h = prepared(moments(rng, cols), 4 * cols, SecondOrder())
    before = h.copy()
    v = factor(h)
    assert v.dtype == np.float32 and np.array_equal(v, np.triu(v)) and (v.diagonal() > 0).all()
    assert np.abs(off_factor(v, h)).max() < 1e-5
    assert np.array_equal(h, before)
    u = np.linalg.inv(v.astype(np.float64))
    assert np.allclose(u.T @ u @ h, np.eye(cols), atol=1e-3)  # inv(H) = UT U, as GPTQ has it


def test_factor_against_the_closed_form(rng: np.random.Generator) -> None:
    """V is unique: numpy's Cholesky of H turned around."""
    h = prepared(moments(rng, 200), 800, SecondOrder())
    want = np.linalg.cholesky(h[::-1, ::-1].astype(np.float64))[::-1, ::-1]
    assert np.abs(factor(h) - want).max() < 1e-5


@pytest.mark.parametrize("cols", [32, 160, 300])
@pytest.mark.parametrize("tokens", [1, 3])
def test_a_singular_h_gets_more_on_its_diagonal_alone(cols: int, tokens: int, rng: np.random.Generator) -> None:
    x = rng.normal(size=(tokens, cols))
    h = (x.T @ x * cols / (x * x).sum()).astype(np.float32)
    before = h.copy()
    v = factor(h)
    off = off_factor(v, h)
    more = off.diagonal()
    assert np.isfinite(v).all() and np.array_equal(h, before)
    assert np.abs(off - np.diag(more)).max() < 1e-5
    assert np.ptp(more) < 1e-5 and 0.009 < more.mean() < 1.001


def test_how_much_more_follows_from_how_singular_it_is(rng: np.random.Generator) -> None:
    """1, 4, 16, 64, 100 hundredths of the diagonal, the first that is enough; no more than that."""
    q = np.linalg.qr(rng.normal(size=(160, 160)))[0]
    for lowest, enough in ((-0.005, 0.01), (-0.02, 0.04), (-0.1, 0.16), (-0.5, 0.64), (-0.9, 1.0)):
        h = (q * np.linspace(lowest, 2, 160)) @ q.T
        off = off_factor(factor(h.astype(np.float32)), h)
        assert np.allclose(off, enough * np.eye(160), atol=1e-4)
    h = ((q * np.linspace(-1.1, 2, 160)) @ q.T).astype(np.float32)
    with pytest.raises(QuantizeError, match=r"^second moments are singular$"):
        factor(h)


def test_nearly_singular_needs_no_more(rng: np.random.Generator) -> None:
    """The usual damping is enough for one token."""
    h = prepared(moments(rng, 288, 1), 1, SecondOrder(shrink=0.0))
    assert np.abs(off_factor(factor(h), h)).max() < 1e-4


@pytest.mark.parametrize("at", [(3, 3), (200, 200), (5, 200), (200, 201)])
def test_factor_of_what_is_no_number(at: tuple[int, int]) -> None:
    h = np.eye(256, dtype=np.float32)
    h[at] = h[at[::-1]] = np.nan
    with pytest.raises(QuantizeError, match="second moments are singular"):
        factor(h)


# ---- prepared ----


def test_prepared(rng: np.random.Generator) -> None:
    h = moments(rng, 96)
    before = h.copy()
    got = prepared(h, 500, SecondOrder(shrink=0.25, damp=0.02))
    want = 0.75 * h / h.diagonal().mean(dtype=np.float64)
    np.fill_diagonal(want, h.diagonal() / h.diagonal().mean(dtype=np.float64) + 0.02)
    assert got.dtype == np.float32 and np.allclose(got, want, rtol=1e-5, atol=1e-7)
    assert np.array_equal(h, before) and not np.shares_memory(got, h)
    assert got.diagonal().mean() == pytest.approx(1.02, rel=1e-5)


@pytest.mark.parametrize("scale", [2.0**-90, 2.0**60])
def test_the_size_of_h_does_not_matter(scale: float, rng: np.random.Generator) -> None:
    h = moments(rng, 64)
    one, other = prepared(h, 256, SecondOrder()), prepared(h * np.float32(scale), 256, SecondOrder())
    assert np.allclose(one, other, rtol=1e-6, atol=0)


def test_a_read_only_h(rng: np.random.Generator) -> None:
    """As it comes out of a file."""
    h = moments(rng, 64)
    h.flags.writeable = False
    assert np.array_equal(prepared(h, 256, SecondOrder()), prepared(h.copy(), 256, SecondOrder()))


def test_shrinkage() -> None:
    assert shrinkage(100, 100) == 0.5 and shrinkage(100, 1) == 0.5
    assert shrinkage(100, 900) == pytest.approx(0.2)
    assert 0.1 <= shrinkage(100, 10**9) < 0.1001
    falling = [shrinkage(4096, n) for n in (1, 4096, 10000, 10**5, 10**6)]
    assert falling == sorted(falling, reverse=True) and falling[2] > falling[3] > falling[4]


def test_few_tokens_shrink_more(rng: np.random.Generator) -> None:
    h = moments(rng, 64)
    few, many = prepared(h, 64, SecondOrder()), prepared(h, 10**9, SecondOrder())
    off = ~np.eye(64, dtype=bool)
    assert np.allclose(few[off] / many[off], 0.5 / 0.9, rtol=1e-4) and np.array_equal(few.diagonal(), many.diagonal())
    assert np.array_equal(few, prepared(h, 10**9, SecondOrder(shrink=0.5)))


def test_dead_inputs_get_the_mean_diagonal(rng: np.random.Generator) -> None:
    h, dead = moments(rng, 64), [0, 5, 63]
    h[dead], h[:, dead] = 0, 0
    got = prepared(h, 256, SecondOrder(damp=0.01))
    assert (got.diagonal()[dead] == np.float32(1.01)).all()
    rest = got[dead]
    assert np.count_nonzero(rest) == len(dead)
    assert np.isfinite(factor(got)).all()


@KINDS
def test_weights_of_dead_inputs_are_rounded_plainly(kind: TensorType, rng: np.random.Generator) -> None:
    w, h = weights(rng, 24, 160), moments(rng, 160)
    dead = [0, 33, 34, 159]
    h[dead], h[:, dead] = 0, 0
    found = in_weight_order(kind, w, prepared(h, 640, SecondOrder()))
    step = scale_to_float(found.codes).repeat(32, axis=1)[:, dead]
    far = np.abs(w - found.weights())[:, dead] / step
    assert (far <= 3.5).all() and (far < 1.01).mean() > 0.8


@pytest.mark.parametrize("at", [(0, 0), (7, 7)])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_diagonal_that_is_not_finite(at: tuple[int, int], bad: float, rng: np.random.Generator) -> None:
    h = moments(rng, 32)
    h[at] = bad
    with pytest.raises(QuantizeError, match=r"^second moments are not finite or all zero$"):
        prepared(h, 128, SecondOrder())


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_the_rest_of_h_not_finite(bad: float, rng: np.random.Generator) -> None:
    h = moments(rng, 32)
    h[3, 5] = h[5, 3] = bad
    with pytest.raises(QuantizeError, match=r"^second moments are not finite$"):
        prepared(h, 128, SecondOrder())


@pytest.mark.parametrize("h", [np.zeros((32, 32), np.float32), -np.eye(32, dtype=np.float32)], ids=["zero", "negative"])
def test_no_power_at_all(h: np.ndarray) -> None:
    with pytest.raises(QuantizeError, match="not finite or all zero"):
        prepared(h, 128, SecondOrder())


# ---- columns along the chain ----


@pytest.mark.parametrize("cols", [32, 96, 160])
def test_chain_order(cols: int, rng: np.random.Generator) -> None:
    assert np.array_equal(chain_order(TP2_1, cols), np.arange(cols))
    order = chain_order(TP2_2, cols)
    assert order.dtype == np.int64 and np.array_equal(order.reshape(-1, 32) % 32, np.tile(CHAIN, (cols // 32, 1)))
    assert (order // 32 == np.arange(cols) // 32).all()  # no column leaves its group
    w = weights(rng, 3, cols)
    back = np.empty_like(w)
    back[:, order] = w[:, order]
    assert np.array_equal(back, w) and not np.array_equal(order, np.arange(cols))


def test_levels_of_the_chain_are_none_in_another_order(rng: np.random.Generator) -> None:
    """What the order is for: without the way back hardly a unit could be stored."""
    w, h = problem(rng, TP2_2, 40, 160)
    order = chain_order(TP2_2, 160)
    along = in_weight_order(TP2_2, w, h).levels[:, order]
    assert TP2_2.from_levels
    assert (TP2_2.from_levels(along) == 255).mean() > 0.9


def test_weights_of() -> None:
    levels = np.arange(-5, 59, dtype=np.int8).reshape(1, 64).repeat(2, axis=0)
    codes = np.array([[240, 0], [255, 16]], np.uint8)
    got = weights_of_levels(levels, codes)
    assert got.dtype == np.float32 and got.flags.c_contiguous
    assert np.array_equal(got[0, :32], levels[0, :32]) and np.array_equal(got[0, 32:], levels[0, 32:] * 2.0**-15)
    assert np.array_equal(got[1, :32], levels[1, :32] * 1.9375) and np.array_equal(got, Levels(levels, codes).weights())


# ---- calibrate ----


def textbook(kind: TensorType, w: np.ndarray, h: np.ndarray, window: int) -> Levels:
    """GPTQ of all columns at once: U of inv(H) = UT U by inversion in float64, every error fed to all that come."""
    u = np.linalg.cholesky(np.linalg.inv(h.astype(np.float64))).T.astype(np.float32)
    levels, codes, _ = (gptq_block if kind == TP2_1 else kbest_gptq_block)(w, u, window)
    return Levels(levels, codes)


@KINDS
@pytest.mark.parametrize("cols", [32, 128, 288])
def test_gptq_equals_the_textbook(kind: TensorType, cols: int, rng: np.random.Generator) -> None:
    """288 columns: blocks of 128, 128 and 32. What differs is rounding, which may tip a weight at a tie."""
    w, h = problem(rng, kind, 24, cols)
    order = chain_order(kind, cols)
    w, h = w[:, order], h[order][:, order]
    got = calibrate(kind, w, h, factor(h), GPTQ, 1)
    want = textbook(kind, w, h, WINDOWS[kind.id])
    assert (got.levels == want.levels).mean() > 0.98 and (got.codes == want.codes).mean() > 0.98
    ours, theirs = cost(w, h, got).sum(), cost(w, h, want).sum()
    assert ours == pytest.approx(theirs, rel=0.01)
    other = textbook(kind, w, np.diag(h.diagonal()).astype(np.float32), WINDOWS[kind.id])  # no feedback at all
    assert (other.levels == want.levels).mean() < 0.95 and cost(w, h, other).sum() > 1.2 * theirs


@KINDS
def test_better_than_search(kind: TensorType, rng: np.random.Generator) -> None:
    w, h = problem(rng, kind, 48, 288)
    plain = Levels(*unpacked(kind, native.quantize(kind, "search", w, None, 1)))
    costs = [cost(w, h, p).sum() for p in (plain, in_weight_order(kind, w, h, GPTQ), in_weight_order(kind, w, h))]
    assert costs[1] < 0.7 * costs[0] and costs[2] < 0.99 * costs[1]


@KINDS
def test_descent_never_costs(kind: TensorType, rng: np.random.Generator) -> None:
    w, h = problem(rng, kind, 48, 288)
    costs = [cost(w, h, in_weight_order(kind, w, h, SecondOrder(passes=n))) for n in range(4)]
    for before, after in itertools.pairwise(costs):
        assert (after <= before * (1 + 1e-5)).all()
    assert costs[0].sum() > costs[1].sum() > costs[2].sum()


@KINDS
@pytest.mark.parametrize("cols", [32, 96, 160, 288])
def test_levels_that_the_type_holds(kind: TensorType, cols: int, rng: np.random.Generator) -> None:
    w, h = problem(rng, kind, 33, cols)
    levels, codes = in_weight_order(kind, w, h)
    assert levels.dtype == np.int8 and levels.shape == (33, cols)
    assert codes.dtype == np.uint8 and codes.shape == (33, cols // 32)
    assert kind.from_levels and kind.to_levels
    digits = kind.from_levels(levels)
    assert (digits <= 8).all() and np.array_equal(kind.to_levels(digits), levels)
    stored = native.dequantize(kind, native.pack(kind, digits, codes))
    assert np.array_equal(stored.reshape(33, cols), Levels(levels, codes).weights())


@KINDS
def test_the_number_of_threads_changes_nothing(kind: TensorType, rng: np.random.Generator) -> None:
    w, h = problem(rng, kind, 67, 160)
    one = in_weight_order(kind, w, h, threads=1)
    for threads in (0, 2, 5):
        other = in_weight_order(kind, w, h, threads=threads)
        assert np.array_equal(one.levels, other.levels) and np.array_equal(one.codes, other.codes)


@KINDS
def test_inputs_are_left_alone(kind: TensorType, rng: np.random.Generator) -> None:
    w, h = problem(rng, kind, 8, 160)
    v = factor(h)
    kept = [a.copy() for a in (w, h, v)]
    first = calibrate(kind, w, h, v)
    assert all(map(np.array_equal, kept, (w, h, v)))
    assert all(map(np.array_equal, first, calibrate(kind, w, h, v, SecondOrder())))


@KINDS
def test_window(kind: TensorType, rng: np.random.Generator) -> None:
    """None is the type's own; none at all costs."""
    w, h = problem(rng, kind, 64, 160)
    usual, same, none = (
        in_weight_order(kind, w, h, SecondOrder(passes=0, window=n)) for n in (None, WINDOWS[kind.id], 0)
    )
    assert all(map(np.array_equal, usual, same))
    assert cost(w, h, usual).sum() < 0.99 * cost(w, h, none).sum()


@KINDS
def test_rows_do_not_depend_on_each_other(kind: TensorType, rng: np.random.Generator) -> None:
    """Several matrices of one input are done as one; BLAS may sum otherwise, so nearly all."""
    w, h = problem(rng, kind, 48, 288)
    whole, part = in_weight_order(kind, w, h, GPTQ), in_weight_order(kind, w[10:30], h, GPTQ)
    assert (whole.levels[10:30] == part.levels).mean() > 0.99
    assert cost(w[10:30], h, part).sum() == pytest.approx(cost(w, h, whole)[10:30].sum(), rel=0.01)


@KINDS
def test_zero_weights(kind: TensorType, rng: np.random.Generator) -> None:
    """A row of zeros next to others; TP2_2's chain cannot hold zeros alone, so small is enough."""
    w, h = problem(rng, kind, 4, 160)
    w[2] = 0
    found = in_weight_order(kind, w, h)
    assert np.abs(found.weights()[2]).max() <= 6 * 2.0**-15 and kind.from_levels
    assert (kind.from_levels(found.levels) <= 8).all()
