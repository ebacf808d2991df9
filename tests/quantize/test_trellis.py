"""`search` for TP2_2: the numpy reference and the native core give the same bytes; the closed path is the best one."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from ptqtp_gguf.codec import native
from ptqtp_gguf.codec.tp2_1 import scale_from_float, scale_to_float
from ptqtp_gguf.codec.tp2_2 import CHAIN, TP2_2
from ptqtp_gguf.quantize import trellis
from ptqtp_gguf.quantize.methods import METHODS, quantize

SEARCH = METHODS["search"]
KINDS = ("normal", "t1.5", "ternary", "zero", "tiny", "huge", "bf16")
ROW = 5 * 32  # 11 rows are groups for no whole number of SIMD vectors


def sample(kind: str, rows: int, rng: np.random.Generator) -> np.ndarray:
    shape = (rows, ROW)
    normal: np.ndarray = rng.normal(size=shape)
    w: np.ndarray
    if kind == "t1.5":
        w = np.clip(0.02 * rng.standard_t(1.5, size=shape), -11.625, 11.625)
    elif kind == "ternary":
        code = rng.integers(0, 256, size=(rows, 5)).astype(np.uint8)
        w = 2 * scale_to_float(code).repeat(32, axis=1) * rng.integers(-1, 2, size=shape)
    elif kind == "zero":
        w = np.where(normal < 0, -0.0, 0.0)
    elif kind == "tiny":
        w = 1e-30 * normal
    elif kind == "huge":
        w = np.clip(11.6 * np.sign(normal) + 0.01 * normal, -11.625, 11.625)
    else:
        w = 0.02 * normal
    w = w.astype(np.float32)
    return (w.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32) if kind == "bf16" else w


def importances(rng: np.random.Generator) -> dict[str, np.ndarray | None]:
    some = rng.exponential(size=ROW).astype(np.float32)
    group = some.copy()
    group[32:64] = 0  # inputs that never fire
    wide = (some * 10.0 ** rng.integers(-30, 30, ROW)).astype(np.float32)
    flat = {f"{h:g}": np.full(ROW, h, np.float32) for h in (0, 1e38, 1e-38, 3e38)}
    return {"none": None, "some": some, "a group of zeros": group, "wide": wide, **flat}


@pytest.mark.parametrize("kind", KINDS)
def test_native_equals_reference(kind: str, rng: np.random.Generator) -> None:
    w = sample(kind, 11, rng)
    assert np.abs(w).max() <= TP2_2.reach
    for name, h in importances(rng).items():
        packed = quantize(TP2_2, SEARCH, w, h)
        assert np.array_equal(packed, quantize(TP2_2, SEARCH, w, h, use_reference=True)), name
        digits, codes = native.unpack(TP2_2, packed)
        assert kind != "zero" or (codes == 0).all(), name
        assert kind not in ("zero", "tiny") or (digits == 4).all(), name


def test_zeros_stay_zeros_whatever_the_importance(rng: np.random.Generator) -> None:
    h = importances(rng)["wide"]
    assert (native.unpack(TP2_2, quantize(TP2_2, SEARCH, sample("zero", 1, rng), h))[0] == 4).all()


def test_all_kinds_side_by_side(rng: np.random.Generator) -> None:
    """A lane's group does not reach into its neighbour's, however many groups there are."""
    w = np.concatenate([sample(kind, 3, rng) for kind in KINDS]).reshape(-1, 32)
    w = w[rng.permutation(len(w))]
    whole = quantize(TP2_2, SEARCH, w)
    assert np.array_equal(whole, quantize(TP2_2, SEARCH, w, use_reference=True))
    for n in (1, 2, 3, 7, 17):
        assert np.array_equal(whole[5 : 5 + n], quantize(TP2_2, SEARCH, w[5 : 5 + n]))


def test_ternary_weights_are_exact(rng: np.random.Generator) -> None:
    """v of five significant bits is level 2 of a scale that there is; so are weights up to levels -2 .. 2 of one."""
    codes = np.arange(256, dtype=np.uint8)[:, None]
    for most in (1, 2):
        levels = rng.integers(-most, most + 1, size=(256, ROW))
        levels[:, ::32] = most  # the largest of each group is there
        w = (scale_to_float(codes) * (2 // most) * levels).astype(np.float32)
        for name, h in importances(rng).items():
            if h is None or (0 < h.min() and h.max() < 10):
                assert np.array_equal(native.dequantize(TP2_2, quantize(TP2_2, SEARCH, w, h)), w), (most, name)


# ---- the best closed path ----


def closed_costs(x: np.ndarray, h: np.ndarray, s: np.ndarray) -> np.ndarray:
    """x, h (N, C) along the chain, s (N,) -> the least sum of h * e^2 of any closed path, in float64.

    Another way than Viterbi's: matrices (N, 9, 9) of the least cost from a pair of trits before to the pair behind,
    multiplied from left to right in (min, +); all 9 diagonals that close with the sign changed are compared.
    """
    pairs = list(itertools.product((-1, 0, 1), repeat=2))
    whole = np.where(np.eye(9, dtype=bool), 0.0, np.inf)[None].repeat(len(x), axis=0)
    for c in range(x.shape[1]):
        step = np.full((len(x), 9, 9), np.inf)
        for (i, (a, b)), (j, (b_again, t2)) in itertools.product(enumerate(pairs), repeat=2):
            if b == b_again:
                third = (a + b + 1) % 3 - 1
                errors = [x[:, c] - s * (3 * t1 + 2 * t2 + third) for t1 in (-1, 0, 1)]
                step[:, i, j] = h[:, c] * np.min(np.square(errors), axis=0)
        whole = np.min(whole[:, :, :, None] + step[:, None], axis=2)
    ends = [whole[:, i, pairs.index((-a, -b))] for i, (a, b) in enumerate(pairs)]
    return np.min(ends, axis=0)


def cost(w: np.ndarray, packed: np.ndarray, h: np.ndarray) -> np.ndarray:
    """Of each group (N, 32)."""
    e = native.dequantize(TP2_2, packed).astype(np.float64) - w
    return (h * e**2).sum(axis=1)


def own(w: np.ndarray) -> np.ndarray:
    a = np.abs(w.astype(np.float64))
    return 2 * a.mean(axis=1, keepdims=True) + a


@pytest.mark.parametrize("kind", ["normal", "t1.5", "huge"])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_closed_path_is_the_best_at_its_scale(kind: str, weighted: bool, rng: np.random.Generator) -> None:
    w = sample(kind, 40, rng).reshape(-1, 32)
    h = rng.exponential(size=32).astype(np.float32) if weighted else None
    packed = quantize(TP2_2, SEARCH, w, h)
    each = own(w) if h is None else h.astype(np.float64)[None].repeat(len(w), axis=0)
    s = scale_to_float(native.unpack(TP2_2, packed)[1].astype(np.uint8))[:, 0].astype(np.float64)
    best = closed_costs(w[:, CHAIN].astype(np.float64), each[:, CHAIN], s)
    got = cost(w, packed, each)
    assert (got <= best * (1 + 1e-5)).all() and (got >= best * (1 - 1e-9)).all()


def test_the_scale_is_nearly_the_best_of_those_tried(rng: np.random.Generator) -> None:
    """Codes are ranked without closing the path exactly: the sum of errors is within .2 % of the best."""
    w = np.concatenate([sample(kind, 24, rng) for kind in ("normal", "t1.5")]).reshape(-1, 32)
    h = own(w)
    middle = scale_from_float(np.abs(w).max(axis=1) / np.float32(6)).astype(int)
    x, along = w[:, CHAIN].astype(np.float64), h[:, CHAIN]
    codes = [np.clip(middle + step, 0, 255).astype(np.uint8) for step in range(-6, 8)]
    best = np.min([closed_costs(x, along, scale_to_float(c).astype(np.float64)) for c in codes], axis=0)
    got = cost(w, quantize(TP2_2, SEARCH, w), h)
    assert got.sum() <= 1.002 * best.sum()


def test_against_every_path_of_a_short_chain(rng: np.random.Generator) -> None:
    """Chains of 4 weights: all 9^4 digits are tried."""
    n, length = 60, 4
    x = (0.3 * rng.standard_t(3, size=(n, length))).astype(np.float32)
    h, s = rng.exponential(size=(n, length)).astype(np.float32), np.linspace(0.05, 0.3, n, dtype=np.float32)
    digits = np.stack(np.meshgrid(*[np.arange(9)] * length, indexing="ij"), axis=-1).reshape(-1, length)
    t1, t2 = digits // 3 - 1, digits % 3 - 1
    before = np.concatenate([-t2[:, -2:], t2], axis=1)
    levels = 3 * t1 + 2 * t2 + (before[:, :-2] + before[:, 1:-1] + 1) % 3 - 1
    all_costs = (h[:, None] * (x[:, None] - s[:, None, None] * levels).astype(np.float64) ** 2).sum(axis=2)
    start = trellis.best_start(x, h, s)
    path = np.full((n, trellis.STATES), trellis.LARGE, np.float32)
    path[np.arange(n), start] = 0
    _, came = trellis.lap(x, h, s, path)
    found = trellis.trace(x, s, start, came).astype(int) @ 9 ** np.arange(length - 1, -1, -1)
    got = all_costs[np.arange(n), found]
    assert (got <= all_costs.min(axis=1) * (1 + 1e-5)).all()
    assert len(set(start.tolist())) == trellis.STATES  # all starts are the best of some


def test_closing_the_chain_costs_some_percent(rng: np.random.Generator) -> None:
    """So free paths would be better, and a path that did not close would be seen above."""
    w = sample("normal", 24, rng).reshape(-1, 32)
    x, h = w[:, CHAIN], np.ones((len(w), 32), np.float32)
    s = scale_to_float(native.unpack(TP2_2, quantize(TP2_2, SEARCH, w))[1].astype(np.uint8))[:, 0]
    free, _ = trellis.lap(x, h, s, np.zeros((len(w), trellis.STATES), np.float32))
    closed = closed_costs(x.astype(np.float64), h, s.astype(np.float64))
    assert 1.005 < closed.sum() / free.min(axis=1).sum() < 1.1
