"""`calibrated` as a whole: better than what knows less, sound where H is not, and equal to its parts in numpy."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from ptqtp_gguf.calibrate.store import unpacked
from ptqtp_gguf.codec import TensorType, native
from ptqtp_gguf.codec.tp2_1 import LEVELS, TP2_1
from ptqtp_gguf.codec.tp2_2 import TP2_2
from ptqtp_gguf.errors import QuantizeError
from ptqtp_gguf.quantize import gptq as calibrated
from ptqtp_gguf.quantize import gptq_reference as blocks
from ptqtp_gguf.quantize.gptq import Planes, Settings, calibrate
from ptqtp_gguf.quantize.torch_codec import code_scales

if TYPE_CHECKING:
    import torch
else:
    torch = pytest.importorskip("torch")

KINDS = pytest.mark.parametrize("kind", [TP2_1, TP2_2], ids=lambda t: t.name)
PLAIN_GPTQ = Settings(passes=(0, 0))  # and least squares, which can only help it


def problem(rng: np.random.Generator, rows: int = 24, cols: int = 160, tokens: int = 400) -> tuple:
    """Weights and correlated inputs: w (R, C), h (C, C)."""
    mix = rng.normal(size=(cols, cols)) * rng.lognormal(0, 1, cols) / cols**0.5
    x = rng.normal(size=(tokens, cols)) @ mix + 0.3 * rng.normal(size=(tokens, 1))
    w = (rng.normal(size=(rows, cols)) * 0.05).astype(np.float32)
    return torch.from_numpy(w), torch.from_numpy((x.T @ x).astype(np.float32))


def cost(w: torch.Tensor, h: torch.Tensor, planes: Planes) -> torch.Tensor:
    """tr(E H ET) of each row, float64."""
    e = (w - planes.weights()).double()
    return ((e @ h.double()) * e).sum(-1)


def search(w: torch.Tensor, kind: TensorType = TP2_1) -> Planes:
    return Planes(*map(torch.from_numpy, unpacked(kind, native.quantize(kind, "search", w.numpy(), None, 1))))


def valid(planes: Planes, rows: int, cols: int, kind: TensorType) -> bool:
    """Right in form, and levels that the type can hold, in weight order."""
    levels, codes = planes
    assert kind.from_levels
    return (
        (levels.dtype, codes.dtype, levels.shape, codes.shape)
        == (torch.int8, torch.uint8, (rows, cols), (rows, cols // 32))
    ) and bool((kind.from_levels(levels.numpy()) <= 8).all())


@KINDS
def test_beats_search_and_gptq(kind: TensorType, rng: np.random.Generator) -> None:
    w, h = problem(rng)
    d, _ = calibrated._prepare(h, 0.05)
    found = [search(w, kind), calibrate(w, h, None, PLAIN_GPTQ, kind=kind), calibrate(w, h, kind=kind)]
    found.append(calibrate(w, h, None, Settings(passes=(2, 2)), kind=kind))
    costs = [float(cost(w, d, p).sum()) for p in found]
    assert costs[1] < 0.6 * costs[0] and costs[2] < 0.96 * costs[1] and costs[3] < costs[2]
    assert all(valid(p, 24, 160, kind) for p in found)


def test_least_squares_help_gptq(rng: np.random.Generator) -> None:
    w, h = problem(rng)
    d, u = calibrated._prepare(h, 0.05)
    gptq = calibrated._gptq(calibrated._blocks(TP2_1, w, 1), w, u, 2)
    assert float(cost(w, d, calibrate(w, h, None, PLAIN_GPTQ)).sum()) <= float(cost(w, d, gptq).sum())


def test_tp2_2_is_a_quarter_better(rng: np.random.Generator) -> None:
    w, h = problem(rng, 64, 256, 1000)
    d, _ = calibrated._prepare(h, 0.05)
    costs = [float(cost(w, d, calibrate(w, h, kind=kind)).sum()) for kind in (TP2_1, TP2_2)]
    assert costs[1] < 0.85 * costs[0]


@KINDS
@pytest.mark.parametrize("factor", [1e-30, 1.0, 1e25])
def test_the_size_of_h_does_not_matter(kind: TensorType, rng: np.random.Generator, factor: float) -> None:
    w, h = problem(rng, 8, 64)
    one, other = calibrate(w, h, kind=kind), calibrate(w, h * factor, kind=kind)
    assert (one.levels == other.levels).float().mean() > 0.995  # the factor is not a power of two


@KINDS
def test_dead_inputs(kind: TensorType, rng: np.random.Generator) -> None:
    """Where nothing ever comes the weights are rounded plainly, and the others are as good as without them."""
    w, h = problem(rng, 16, 128)
    dead = torch.zeros(128, dtype=torch.bool)
    dead[[1, 40, 41, 127]] = True
    h[dead], h[:, dead] = 0, 0
    planes = calibrate(w, h, kind=kind)
    assert valid(planes, 16, 128, kind)
    assert float(cost(w, h, planes).sum()) < 0.6 * float(cost(w, h, search(w, kind)).sum())
    s = code_scales(planes.codes).repeat_interleave(32, 1)[:, dead]
    off = (w - planes.weights())[:, dead].abs()
    nearest = (w[:, dead, None] - s[..., None] * torch.tensor(LEVELS)).abs().amin(-1)
    assert kind != TP2_1 or torch.allclose(off, nearest, atol=1e-7)  # of TP2_2 the path decides
    assert bool((off <= 3.5 * s).all())


@KINDS
def test_h_of_few_tokens(kind: TensorType, rng: np.random.Generator) -> None:
    """Singular: one token, and three; a float32 sum may even have a negative eigenvalue."""
    for tokens in (1, 3):
        w, h = problem(rng, 8, 96, tokens)
        planes = calibrate(w, h, kind=kind)
        assert valid(planes, 8, 96, kind)
        assert float(cost(w, h, planes).sum()) < 0.2 * float(cost(w, h, search(w, kind)).sum())
    w, h = problem(rng, 8, 96, 40)
    off = h - 0.2 * h.diagonal().mean() * torch.eye(96)  # damped by 0.05 it is still indefinite
    assert float(torch.linalg.eigvalsh(off.double()).min()) < -0.05 * float(off.diagonal().mean())
    off.diagonal().clamp_(min=1e-3)
    assert valid(calibrate(w, off, kind=kind), 8, 96, kind)
    with pytest.raises(QuantizeError, match="second moments are singular"):
        calibrate(w, off - 100 * h.diagonal().mean() * (torch.ones(96, 96) - torch.eye(96)))


def test_what_is_refused(rng: np.random.Generator) -> None:
    w, h = problem(rng, 4, 64)
    for bad in (float("nan"), float("inf")):
        broken = h.clone()
        broken[3, 5] = bad
        with pytest.raises(QuantizeError, match="second moments are not finite or all zero"):
            calibrate(w, broken)
        with pytest.raises(QuantizeError, match="moments with the unquantized inputs are not finite"):
            calibrate(w, h, broken)
    with pytest.raises(QuantizeError, match="not finite or all zero"):
        calibrate(w, torch.zeros(64, 64))
    for shape in ((64, 64), (60, 60)):
        with pytest.raises(QuantizeError, match=r"second moments of shape .* multiples of 32"):
            calibrate(torch.zeros(4, 60), torch.eye(shape[0]))


def test_least_squares_never_costs(rng: np.random.Generator) -> None:
    w, h = problem(rng, 64, 128)
    d, u = calibrated._prepare(h, 0.05)
    starts = [search(w), calibrated._gptq(calibrated._blocks(TP2_1, w, 1), w, u, 2)]
    starts.append(Planes(starts[1].levels, starts[1].codes + 1))  # scales off: much to gain
    starts.append(Planes(torch.zeros_like(starts[0].levels), starts[0].codes))  # nothing at all to gain
    gains = []
    for start in starts:
        before, after = cost(w, d, start), cost(w, d, calibrated._least_squares(w, d, start))
        assert bool((after <= before * (1 + 1e-5)).all())
        gains.append(float(after.sum() / before.sum()))
    assert gains[2] < 0.9 and gains[0] < 0.995 and gains[3] == 1


def test_aim_moves_towards_the_target(rng: np.random.Generator) -> None:
    """x is the quantized model's input, x_full the one that it should have been: outputs come nearer to w x_full."""
    cols, rows = 96, 16
    w = torch.from_numpy((rng.normal(size=(rows, cols)) * 0.05).astype(np.float32))
    x_full = torch.from_numpy(rng.normal(size=(900, cols)).astype(np.float32)) @ torch.randn(
        cols, cols, generator=torch.Generator().manual_seed(1)
    )
    x = 0.9 * x_full + 0.5 * x_full.roll(1, 1)
    h, cross = x.T @ x, x_full.T @ x
    off = []
    for aim in (0.0, 0.5, 1.0):
        planes = calibrate(w, h, cross, Settings(aim=aim))
        off.append(float((x @ planes.weights().T - x_full @ w.T).norm() / (x_full @ w.T).norm()))
    assert off[2] < 0.7 * off[1] < 0.7 * off[0]
    same = [calibrate(w, h, c, Settings(aim=a)) for c, a in ((None, 1.0), (cross, 0.0))]
    assert torch.equal(same[0].levels, same[1].levels) and torch.equal(same[0].codes, same[1].codes)


def numpy_at(t: torch.Tensor, row: int = 0, col: int = 0) -> np.ndarray:
    """In the place of an address: the rest of the matrix from one element on, as a view."""
    return t.numpy()[row:, col:]


@KINDS
def test_equals_the_reference_driven_the_same_way(
    kind: TensorType, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The inner loops exchanged for gptq_reference.py, byte for byte; 288 columns: blocks of 128 and one of 32."""
    w, h = problem(rng, 9, 288)
    cross = h @ (torch.eye(288) + 0.01 * torch.from_numpy(rng.normal(size=(288, 288)).astype(np.float32)))
    native_one = calibrate(w, h, cross, threads=1, kind=kind)
    widths = []

    def gptq(
        r: int,
        c: int,
        v: np.ndarray,
        u: np.ndarray,
        levels: np.ndarray,
        codes: np.ndarray,
        err: np.ndarray,
        *,
        window: int,
    ) -> None:
        widths.append(c)
        block = blocks.gptq_block if kind == TP2_1 else blocks.kbest_gptq_block
        found = block(v[:r, :c], u[:c, :c], window)
        levels[:r, :c], codes[:r, : c // 32], err[:r, :c] = found

    def descend(
        r: int,
        c: int,
        e: np.ndarray,
        part: np.ndarray,
        levels: np.ndarray,
        codes: np.ndarray,
        delta: np.ndarray,
        *,
        window: int,
    ) -> None:
        sweep = blocks.cd_block if kind == TP2_1 else blocks.kbest_cd_block
        found = sweep(e[:r, :c], part[:c, :c], levels[:r, :c], codes[:r, : c // 32], window)
        levels[:r, :c], codes[:r, : c // 32], delta[:r, :c] = found

    assert calibrated._blocks(kind, w, 1).columns == 128
    monkeypatch.setattr(calibrated, "_at", numpy_at)
    monkeypatch.setattr(calibrated, "_blocks", lambda *_: SimpleNamespace(columns=128, gptq=gptq, descend=descend))
    reference = calibrate(w, h, cross, kind=kind)
    assert widths == [128, 128, 32]
    assert torch.equal(native_one.levels, reference.levels) and torch.equal(native_one.codes, reference.codes)
