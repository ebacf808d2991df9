"""Second moments in a folder: what is summed, and which rows are kept."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kept_moments import WIDE, batches, by_name, rounded, start, values, went

from ptqtp_gguf.calibrate import moments
from ptqtp_gguf.calibrate.moments import (
    Moments,
    from_bf16,
    rows_path,
    sums_path,
    to_bf16,
)

# ---- what is summed ----


def test_sums_are_those_of_all_tokens(folder: Path, rng: np.random.Generator) -> None:
    a, b = values(rng, 230, 32), values(rng, 230, 48)
    g = start(folder)
    for x, y in zip(batches(a, (100, 100, 30)), batches(b, (100, 100, 30)), strict=True):
        g.add("a.weight", x, None, 0, False)
        g.add("b.weight", y, None, 0, False)
    g.checkpoint(4)
    found, inputs = by_name(folder)
    assert list(inputs) == ["a.weight", "b.weight"]
    for name, x in (("a.weight", a), ("b.weight", b)):
        of = inputs[name]
        exact = x.astype(np.float64).T @ x
        h = found.second(of)
        assert h.dtype == np.float32 and np.allclose(h, exact, rtol=1e-4, atol=1e-3)
        assert of.summed and found.tokens(of) == 230 and of.counts == [230] and not of.rows
    assert not list(folder.glob("*.rows")) and sorted(p.name for p in folder.iterdir()) == ["index.json", "sums.1"]


def test_a_batch_that_lies_apart_in_memory(folder: Path, rng: np.random.Generator) -> None:
    """The runtime's memory need not be dense."""
    whole = values(rng, 100, 64)
    g = start(folder)
    g.add("a", whole[::2, 32:], None, 0, False)
    g.add("heads", whole.reshape(2, 50, 64).swapaxes(0, 1), None, 2, False)
    g.add("a", whole[:20, :32], None, 0, True)
    g.checkpoint(4)
    found, inputs = by_name(folder)
    x = whole[::2, 32:]
    assert np.allclose(found.second(inputs["a"]), x.T @ x, rtol=1e-4, atol=1e-3)
    assert np.allclose(found.second(inputs["heads"], 1), whole[50:].T @ whole[50:], rtol=1e-4, atol=1e-3)
    assert np.array_equal(found.rows(inputs["a"], held=True), rounded(whole[:20, :32]))


def test_heads_each_have_a_sum(folder: Path, rng: np.random.Generator) -> None:
    """Every head sees every token; wider than SUM_COLS or not."""
    x = values(rng, 70, 3, 32)
    g = start(folder)
    for part in batches(x, (20, 50)):
        g.add("k_b", part, None, 3, False)
    g.add("k_b", x, None, 3, True)  # held-out windows of heads are not kept
    g.checkpoint(4)
    found, inputs = by_name(folder)
    of = inputs["k_b"]
    assert of.heads and of.summed and of.counts == [70] * 3 and of.cols == 32 and not of.held
    for h in range(3):
        assert np.allclose(found.second(of, h), x[:, h].T @ x[:, h], rtol=1e-4, atol=1e-3)
        assert found.tokens(of, h) == 70
    assert not np.allclose(found.second(of, 0), found.second(of, 1))


def test_experts_with_an_input_together(folder: Path, rng: np.random.Generator) -> None:
    """(T, 1, C): all that a token is sent to get the same."""
    x, to = values(rng, 120, 1, 32), went(rng, 120, 5, 2)
    g = start(folder)
    for a, b in ((0, 7), (7, 120)):
        g.add("gate_exps", x[a:b], to[a:b], 5, False)
    g.checkpoint(4)
    found, inputs = by_name(folder)
    of = inputs["gate_exps"]
    assert of.summed and len(of.counts) == 5 and sum(of.counts) == 240 and of.counts[4] == 0
    for e in range(5):
        mine = x[(to == e).any(axis=1), 0]
        assert np.allclose(found.second(of, e), mine.T @ mine, rtol=1e-4, atol=1e-3)
        assert found.tokens(of, e) == of.counts[e] == len(mine)
    assert not found.second(of, 4).any()


def test_experts_with_inputs_of_their_own(folder: Path, rng: np.random.Generator) -> None:
    """(T, U, C): what each one's own activations are."""
    x, to = values(rng, 120, 2, 32), went(rng, 120, 5, 2)
    g = start(folder)
    for a, b in ((0, 50), (50, 120)):
        g.add("down_exps", x[a:b], to[a:b], 5, False)
    g.checkpoint(4)
    found, inputs = by_name(folder)
    of = inputs["down_exps"]
    assert of.used == 1 and sum(of.counts) == 240
    for e in range(5):
        mine = x[to == e]
        assert np.allclose(found.second(of, e), mine.T @ mine, rtol=1e-4, atol=1e-3)
        assert found.tokens(of, e) == len(mine)


def test_sums_end_where_they_are_too_many(
    folder: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moments, "SUM_BYTES", 2 * 4 * 32 * 32)
    g = start(folder)
    for name in ("a", "b", "c"):
        g.add(name, values(rng, 10, 32), None, 0, False)
    g.checkpoint(4)
    found, inputs = by_name(folder)
    assert [i.summed for i in found] == [True, True, False] and [i.offset for i in found] == [0, 4096, 8192]
    assert sums_path(folder, 1).stat().st_size == 8192 and inputs["c"].rows == 10


# ---- rows that are kept ----


@pytest.mark.usefixtures("narrow")
def test_rows_where_inputs_are_wide(folder: Path, rng: np.random.Generator) -> None:
    x = values(rng, 200, WIDE)
    g = start(folder, 200)
    g.add("down", x, None, 0, False)
    g.add("q", x[:, :64], None, 0, False)  # not above the limit
    g.checkpoint(4)
    found, inputs = by_name(folder)
    of = inputs["down"]
    assert inputs["q"].summed and not of.summed and of.rows == of.passed == 200 and of.counts == [200]
    assert np.array_equal(found.rows(of), rounded(x))
    assert np.allclose(found.second(of), rounded(x).T @ rounded(x), rtol=1e-4, atol=1e-3)
    assert found.tokens(of) == 200
    assert rows_path(folder, of.number, "rows").stat().st_size == 2 * 200 * WIDE


@pytest.mark.usefixtures("narrow")
def test_rows_are_spread_over_the_text(folder: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """100 of 1000 tokens: every tenth, the first one too."""
    monkeypatch.setattr(moments, "ROWS", 100)
    x = values(rng, 1000, WIDE)
    g = start(folder, 1000)
    for part in batches(x, (333, 333, 334)):
        g.add("down", part, None, 0, False)
    g.checkpoint(4)
    found, inputs = by_name(folder)
    of = inputs["down"]
    assert np.array_equal(found.rows(of), rounded(x[::10]))
    assert of.counts == [1000] and of.passed == 1000 and found.tokens(of) == of.rows == 100


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("sizes", [(240,), (1,) * 240, (7, 100, 3, 130), (239, 1), (13,) * 18 + (6,)])
def test_batches_do_not_decide_which_rows_are_kept(
    folder: Path, sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, most in (("ROWS", 50), ("EXPERT_ROWS", 30), ("HELD_ROWS", 3), ("HELD_EXPERTS", 2)):
        monkeypatch.setattr(moments, name, most)
    rng = np.random.default_rng(4)
    x, own, to = values(rng, 240, WIDE), values(rng, 240, 2, WIDE), went(rng, 240, 4, 2)
    g = start(folder, 240)
    for held in (False, True):
        cuts = [0, *np.cumsum(sizes).tolist()]
        for a, b in itertools.pairwise(cuts):
            g.add("plain", x[a:b], None, 0, held)
            g.add("gate", x[a:b, None], to[a:b], 4, held)
            g.add("down", own[a:b], to[a:b], 4, held)
    g.checkpoint(4)
    found, inputs = by_name(folder)
    assert np.array_equal(found.rows(inputs["plain"]), rounded(x[::5]))
    assert np.array_equal(found.rows(inputs["plain"], held=True), rounded(x[::10]))  # 8 * 3 of 240
    flat, flat_to = own.reshape(480, WIDE), to.reshape(480)
    for e in range(4):
        assert np.array_equal(found.rows(inputs["gate"], e), rounded(x[::8][(to[::8] == e).any(axis=1)]))
        assert np.array_equal(found.rows(inputs["down"], e), rounded(flat[::8][flat_to[::8] == e]))
        apart = found.rows(inputs["down"], e, held=True)
        assert np.array_equal(apart, rounded(flat[::5][flat_to[::5] == e]))  # 8 * 3 * 2 of 240 tokens
        h = found.second(inputs["down"], e)
        mine = found.rows(inputs["down"], e)
        assert np.allclose(h, mine.T @ mine, rtol=1e-4, atol=1e-3) and found.tokens(inputs["down"], e) == len(mine)
    assert inputs["gate"].counts == inputs["down"].counts == [int((to == e).sum()) for e in range(4)]


@pytest.mark.usefixtures("narrow")
def test_rows_of_experts_are_read_by_expert(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of one expert, not the file for each of many; to which each row went is read once."""
    rng, n, experts = np.random.default_rng(5), 400, 50
    x, to = values(rng, n, WIDE), went(rng, n, experts, 2)
    g = start(folder, n)
    for held in (False, True):
        g.add("gate", x[:, None], to, experts, held)
    g.checkpoint(4)
    read: list[int] = []
    real = moments._fill

    def counted(f: Any, at: int, out: np.ndarray, path: Path) -> None:
        read.append(out.nbytes)
        real(f, at, out, path)

    monkeypatch.setattr(moments, "_fill", counted)
    found, inputs = by_name(folder)
    of = inputs["gate"]
    for e in range(experts):
        mine = rounded(x[(to == e).any(axis=1)])
        assert found.tokens(of, e) == len(mine)
        assert np.array_equal(found.rows(of, e), mine) and np.array_equal(found.rows(of, e, held=True), mine)
    once = 2 * n * WIDE
    assert sum(read) == 2 * (2 * once + to.nbytes)  # each row goes to two experts


def test_held_out_windows_are_in_no_sum(folder: Path, rng: np.random.Generator) -> None:
    seen, held = values(rng, 60, 32), values(rng, 20, 32)
    to = went(rng, 60, 4, 2)
    g = start(folder, 80)
    g.add("a", seen, None, 0, False)
    g.add("a", held, None, 0, True)
    g.add("gate", seen[:, None], to, 4, False)
    g.add("gate", held[:, None], to[:20], 4, True)
    g.checkpoint(4)
    found, inputs = by_name(folder)
    of = inputs["a"]
    assert np.allclose(found.second(of), seen.T @ seen, rtol=1e-4, atol=1e-3) and found.tokens(of) == 60
    assert np.array_equal(found.rows(of, held=True), rounded(held)) and of.held == of.held_passed == 20
    assert len(found.rows(of)) == 0
    for e in range(4):
        mine = held[(to[:20] == e).any(axis=1)]
        assert np.array_equal(found.rows(inputs["gate"], e, held=True), rounded(mine))
    assert sum(inputs["gate"].counts) == 120


def test_an_input_that_only_held_out_windows_have(folder: Path, rng: np.random.Generator) -> None:
    g = start(folder)
    g.add("a", values(rng, 5, 32), None, 0, True)
    g.checkpoint(4)
    found, inputs = by_name(folder)
    assert found.tokens(inputs["a"]) == 0 and not found.second(inputs["a"]).any()


@pytest.mark.usefixtures("narrow")
def test_diagonals_and_energies(folder: Path, rng: np.random.Generator) -> None:
    """Of sums and of rows, of experts; asked in turns, and twice."""
    x, wide, to = values(rng, 90, 32), values(rng, 90, WIDE), went(rng, 90, 4, 2)
    g = start(folder, 90)
    g.add("q", x, None, 0, False)
    g.add("down", wide, None, 0, False)
    g.add("gate", x[:, None], to, 4, False)
    g.add("wide", wide[:, None], to, 4, False)
    g.checkpoint(4)
    found, inputs = by_name(folder)
    mine = {("q", 0): x, ("down", 0): rounded(wide)}
    for e in range(4):
        sent = (to == e).any(axis=1)
        mine |= {("gate", e): x[sent], ("wide", e): rounded(wide[sent])}
    for (name, e), seen in [*mine.items(), *mine.items()]:
        w = values(rng, 5, seen.shape[1])
        diagonal, exact = found.diagonal(inputs[name], e), seen.astype(np.float64)
        assert diagonal.dtype == np.float32 and diagonal.shape == (seen.shape[1],)
        assert np.allclose(diagonal, (exact**2).sum(axis=0), rtol=1e-4)
        assert found.energy(inputs[name], w, e) == pytest.approx(((exact @ w.T) ** 2).sum(), rel=1e-4)
    diagonal = found.diagonal(inputs["q"])
    diagonal[:] = 0  # the caller's own
    assert found.diagonal(inputs["q"]).all()


def test_shared_inputs(folder: Path, rng: np.random.Generator) -> None:
    g = start(folder)
    for name in ("q", "gate"):
        g.add(name, values(rng, 9, 32), None, 0, False)
    same = {"q": "q", "k": "q", "v": "q", "gate": "gate", "up": "gate", "x": "never seen"}
    g.share(same)
    g.share(same)
    g.checkpoint(4)
    assert [i.tensors for i in Moments(folder)] == [["q", "k", "v"], ["gate", "up"]]


# ---- bf16 ----


def test_bf16_of_what_is_bf16() -> None:
    """Every number that there is comes back, infinities and denormals too."""
    bits = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)
    values = from_bf16(bits)
    number = ~np.isnan(values)
    assert np.array_equal(to_bf16(values[number]), bits[number])
    assert values.dtype == np.float32 and to_bf16(values).dtype == np.uint16


def test_bf16_to_nearest_even() -> None:
    one = 0x3F80_0000
    for low, up in ((0x0000, 0), (0x7FFF, 0), (0x8000, 0), (0x8001, 1), (0xFFFF, 1)):
        for sign in (0, 1 << 31):
            x = np.array([sign | one | low, sign | one | 0x1_0000 | low], np.uint32).view(np.float32)
            even, odd = from_bf16(to_bf16(x)).view(np.uint32)
            assert even == sign | one + (up << 16)
            assert odd == sign | one + ((1 + (low >= 0x8000)) << 16)  # a tie goes away from an odd one


def test_bf16_at_the_ends() -> None:
    tiny = np.float32(1e-40)  # denormal
    x = np.array([np.inf, -np.inf, 0.0, -0.0, 3.4e38, -3.4e38, tiny, -tiny, 1e-45, np.nan], np.float32)
    got = from_bf16(to_bf16(x))
    assert got[:2].tolist() == [np.inf, -np.inf] and got[4:6].tolist() == [np.inf, -np.inf]
    assert got[2:4].view(np.uint32).tolist() == [0, 1 << 31]
    assert abs(float(got[6]) - 1e-40) < 2.0**-134 and got[7] == -got[6] and got[6] > 0 and got[8] == 0
    assert np.isnan(got[9])


def test_bf16_of_many(rng: np.random.Generator) -> None:
    x = (rng.normal(size=5000) * 10.0 ** rng.uniform(-30, 30, 5000)).astype(np.float32)
    assert np.array_equal(from_bf16(to_bf16(x)), rounded(x))
    apart = np.stack([x, x], axis=1)[:, 0]
    assert np.array_equal(to_bf16(apart), to_bf16(x))
