"""Second moments in a folder: what is summed and kept, taken up after a kill, refused where it is damaged."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ptqtp_gguf.calibrate import moments
from ptqtp_gguf.calibrate.moments import (
    VERSION,
    Gathering,
    Index,
    Input,
    Moments,
    from_bf16,
    read_index,
    require_key,
    rows_path,
    sums_path,
    to_bf16,
    write_index,
)
from ptqtp_gguf.errors import CalibrationError, OutputError

KEY = {"model": "m", "tokens": "t", "shape": [4, 60], "tensors": "n"}
WIDE = 96  # of inputs without sums, where SUM_COLS is 64


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "moments").mkdir()
    return tmp_path / "moments"


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs of more than 64 values get no sums."""
    monkeypatch.setattr(moments, "SUM_COLS", 64)


def values(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.normal(size=shape).astype(np.float32)


def rounded(x: np.ndarray) -> np.ndarray:
    """To bf16 and back, by another way: 8 bits of the significand, ties to even."""
    m, e = np.frexp(x.astype(np.float64))
    return np.ldexp(np.round(m * 256) / 256, e).astype(np.float32)


def batches(x: np.ndarray, sizes: Iterable[int]) -> list[np.ndarray]:
    return np.split(x, np.cumsum(list(sizes))[:-1])


def by_name(folder: Path) -> tuple[Moments, dict[str, Input]]:
    found = Moments(folder)
    return found, {i.tensors[0]: i for i in found}


def start(folder: Path, total: int = 1000) -> Gathering:
    return Gathering(folder, KEY, 4, total)


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


def went(rng: np.random.Generator, tokens: int, experts: int, used: int) -> np.ndarray:
    """int32 (tokens, used): `used` different experts of each token, the last expert of none."""
    return np.array([rng.permutation(experts - 1)[:used] for _ in range(tokens)], np.int32)


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
    assert not found.second(of, 4).any() and of.few(1) == [4] and of.few(0) == []


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
    assert found.tokens(inputs["a"]) == 0 and not found.second(inputs["a"]).any() and inputs["a"].few(1) == [0]


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


# ---- taken up again ----


def feed(g: Gathering, window: int) -> None:
    """One window of all kinds of inputs; the third is held out."""
    rng = np.random.default_rng(window)
    to, held = went(rng, 60, 4, 2), window == 2
    g.add("q", values(rng, 60, 32), None, 0, held)
    g.add("down", values(rng, 60, WIDE), None, 0, held)
    g.add("gate", values(rng, 60, 1, 32), to, 4, held)
    g.add("down_exps", values(rng, 60, 2, WIDE), to, 4, held)
    g.add("k_b", values(rng, 60, 2, 32), None, 2, held)


def contents(folder: Path) -> dict[str, bytes]:
    """All but the index, and the sums' name: their number is how often they were saved."""
    return {p.name.split(".")[0] + p.suffix * (p.stem != "sums"): p.read_bytes() for p in folder.glob("*.*[!n]")}


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("saved", [1, 2, 3])
def test_resumed_equals_in_one_go(tmp_path: Path, saved: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed a window and a half after a checkpoint, and again: the same bytes."""
    for name, most in (("ROWS", 70), ("EXPERT_ROWS", 90), ("HELD_ROWS", 4)):
        monkeypatch.setattr(moments, name, most)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for path in (whole, parts):
        path.mkdir()
    g = start(whole, 240)
    for i in range(4):
        feed(g, i)
    g.share({"k": "q"})
    g.checkpoint(4)

    g = start(parts, 240)
    for i in range(saved):
        feed(g, i)
    g.checkpoint(saved)
    for _ in range(saved, 4):  # work that is lost
        feed(g, 3)
    for file in g._files.values():
        file.close()  # on the disk all the same
    g = start(parts, 240)
    assert g.index.done == saved and g.index.windows == 4 and not g.index.complete
    for i in range(saved, 4):
        feed(g, i)
    g.share({"k": "q"})
    g.checkpoint(4)

    assert contents(parts) == contents(whole) and len(contents(whole)) == 10
    a, b = read_index(whole), read_index(parts)
    assert a and b and a.inputs == b.inputs and a.complete and b.complete and a.key == b.key == KEY
    assert (a.generation, b.generation) == (1, 2) and not sums_path(parts, 1).exists()


@pytest.mark.usefixtures("narrow")
def test_killed_before_the_first_checkpoint(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for path in (whole, parts):
        path.mkdir()
    g = start(parts, 120)
    feed(g, 3)
    for file in g._files.values():
        file.close()
    found = read_index(parts)
    assert found and found.done == 0 and not found.inputs
    for path in (whole, parts):
        g = start(path, 120)
        assert g.index.done == 0 and not g.index.inputs
        for i in range(2):
            feed(g, i)
        g.checkpoint(4)
    assert contents(parts) == contents(whole)


def test_killed_while_sums_were_written(folder: Path, rng: np.random.Generator) -> None:
    """Half a file of the next generation is in nobody's way."""
    x = values(rng, 50, 32)
    g = start(folder)
    g.add("a", x, None, 0, False)
    g.checkpoint(2)
    sums_path(folder, 2).write_bytes(b"half")
    g = start(folder)
    g.add("a", x, None, 0, False)
    g.checkpoint(4)
    found, inputs = by_name(folder)
    assert np.allclose(found.second(inputs["a"]), 2 * x.T @ x, rtol=1e-4, atol=1e-3)


def test_the_disk_fails(folder: Path, rng: np.random.Generator) -> None:
    g = start(folder)
    g.add("a", values(rng, 5, 32), None, 0, False)
    (folder / "sums.1").mkdir()
    with pytest.raises(OutputError, match=r"moments: Is a directory; run again to resume$"):
        g.checkpoint(4)


# ---- another's ----


@pytest.mark.parametrize(
    ("name", "words"),
    [("model", "another model"), ("tokens", "another text"), ("shape", "other windows"), ("tensors", "other tensors")],
)
def test_another_key(folder: Path, name: str, words: str) -> None:
    write_index(folder, Index(KEY, 4))
    message = rf"^{folder}: these moments were gathered from {words}; name a new folder$"
    with pytest.raises(CalibrationError, match=message):
        Gathering(folder, {**KEY, name: "x"}, 4, 100)
    without = {k: v for k, v in KEY.items() if k != name}
    with pytest.raises(CalibrationError, match=message):
        require_key(folder, Index(without, 4), KEY)
    require_key(folder, Index(KEY, 4), without)


def test_a_key_without_words_of_its_own(folder: Path) -> None:
    with pytest.raises(CalibrationError, match="gathered from newer; name a new folder"):
        require_key(folder, Index(KEY, 4), {**KEY, "newer": 1})


def test_no_moments(folder: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    for path in (folder, tmp_path / "none"):
        assert read_index(path) is None
        with pytest.raises(CalibrationError, match="holds no second moments; give --calib TEXT to gather them there"):
            Moments(path)
    write_index(folder, Index(KEY, 0))
    with pytest.raises(CalibrationError, match="holds no second moments"):
        Moments(folder)
    g = Gathering(folder, KEY, 4, 100)
    g.index.windows = 4
    g.add("a", values(rng, 5, 32), None, 0, False)
    g.checkpoint(3)
    with pytest.raises(CalibrationError, match="was not finished; give --calib TEXT as before to resume it"):
        Moments(folder)


# ---- damaged ----


@pytest.fixture
def complete(folder: Path, narrow: None) -> Path:
    """A folder with one input of each kind, all four windows in."""
    g = start(folder, 240)
    for i in range(4):
        feed(g, i)
    g.checkpoint(4)
    return folder


def read_all(folder: Path) -> None:
    found = Moments(folder)
    for of in found:
        for e in range(len(of.counts)):
            found.second(of, e)
            found.tokens(of, e)
            found.rows(of, e, held=True)


def one_line(e: pytest.ExceptionInfo[CalibrationError]) -> bool:
    return "\n" not in str(e.value) and len(str(e.value)) < 400


@pytest.mark.parametrize(
    "name", ["sums.1", "1.rows", "3.rows", "3.experts", "0.held", "1.held", "2.held", "2.held-experts"]
)
@pytest.mark.parametrize("what", ["cut", "empty", "missing", "folder"])
def test_files_that_are_damaged(complete: Path, name: str, what: str) -> None:
    read_all(complete)
    path = complete / name
    data = path.read_bytes()
    path.unlink()
    if what == "folder":
        path.mkdir()
    elif what != "missing":
        path.write_bytes(data[:-1] if what == "cut" else b"")
    with pytest.raises(CalibrationError, match=name) as e:
        read_all(complete)
    assert one_line(e)


@pytest.mark.parametrize("what", ["cut", "empty", "missing"])
def test_resuming_on_damaged_sums(complete: Path, what: str) -> None:
    path = complete / "sums.1"
    data = path.read_bytes()
    path.unlink()
    if what != "missing":
        path.write_bytes(data[:-1] if what == "cut" else b"")
    with pytest.raises(CalibrationError, match=r"sums\.1: damaged; remove the folder to gather the moments again"):
        start(complete)


@pytest.mark.parametrize("name", ["1.rows", "3.rows", "3.experts", "0.held", "2.held-experts"])
@pytest.mark.parametrize("what", ["cut", "missing"])
def test_resuming_on_damaged_rows(complete: Path, name: str, what: str) -> None:
    """What was on the disk at the checkpoint must be there; zeros may not take its place."""
    path = complete / name
    data = path.read_bytes()
    path.unlink()
    if what == "cut":
        path.write_bytes(data[: len(data) // 2])
    with pytest.raises(CalibrationError, match=r"damaged|No such file") as e:
        g = start(complete, 240)
        try:
            feed(g, 2 if "held" in name else 1)
        finally:
            for file in g._files.values():
                file.close()
    assert one_line(e)


DAMAGED = "damaged; remove the folder to gather the moments again"


def index_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "index.json").read_text())
    return found


def put_index(folder: Path, found: object) -> None:
    (folder / "index.json").write_text(json.dumps(found))


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"null",
        b"[]",
        b"7",
        b'"text"',
        b"{}",
        b"[" * 100_000,
        b'{"version": 2}',
        b'{"version": 2, "inputs": [],',
    ],
)
def test_no_index_at_all(complete: Path, raw: bytes) -> None:
    (complete / "index.json").write_bytes(raw)
    for reads in (read_index, Moments, start):
        with pytest.raises(CalibrationError, match=rf"index\.json: {DAMAGED}$") as e:
            reads(complete)
        assert one_line(e)


@pytest.mark.parametrize("cut", [1, 10, 100, 500])
def test_an_index_that_is_cut(complete: Path, cut: int) -> None:
    path = complete / "index.json"
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(CalibrationError, match=DAMAGED):
        read_index(complete)


def test_an_index_that_is_no_file(complete: Path) -> None:
    (complete / "index.json").unlink()
    (complete / "index.json").mkdir()
    with pytest.raises(CalibrationError, match=r"index\.json: no regular file"):
        read_index(complete)


def test_an_index_that_is_too_large(complete: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = (complete / "index.json").stat().st_size
    monkeypatch.setattr(moments, "MAX_INDEX", size)
    assert read_index(complete)
    monkeypatch.setattr(moments, "MAX_INDEX", size - 1)
    with pytest.raises(CalibrationError, match=rf"index\.json: {size} bytes; the limit is {size - 1}"):
        read_index(complete)


@pytest.mark.parametrize("key", ["key", "windows", "done", "generation", "inputs"])
@pytest.mark.parametrize("value", [None, "x", -1, [7], {"a": 1}, float("nan"), float("inf"), "-missing-"])
def test_an_index_with_another_value(complete: Path, key: str, value: object) -> None:
    found = index_of(complete)
    found[key] = value
    if value == "-missing-":
        del found[key]
    put_index(complete, found)
    if key == "key" and isinstance(value, dict):  # of the right type: another's
        with pytest.raises(CalibrationError, match="gathered from another model"):
            start(complete)
        return
    with pytest.raises(CalibrationError, match=DAMAGED) as e:
        start(complete)
    assert one_line(e)


@pytest.mark.parametrize("version", [VERSION - 1, VERSION + 1, "2", None, 1e300, float("nan"), [2], "a\nb"])
def test_another_version(complete: Path, version: object) -> None:
    put_index(complete, {**index_of(complete), "version": version})
    with pytest.raises(CalibrationError, match=r"version .*; this program reads 2; name a new folder$") as e:
        start(complete)
    assert one_line(e)


RECORD_KEYS = [*vars(Input(0, ["a"], 1, [0], True))]


@pytest.mark.parametrize("key", RECORD_KEYS)
def test_a_record_without_a_key_or_with_another(complete: Path, key: str) -> None:
    good = index_of(complete)
    bad = index_of(complete)
    bad["inputs"][1][f"{key}x"] = bad["inputs"][1].pop(key)
    put_index(complete, bad)
    with pytest.raises(CalibrationError, match=DAMAGED):
        read_index(complete)
    put_index(complete, good)
    assert read_index(complete)


NUMBERS = ["number", "cols", "offset", "rows", "held", "used", "passed", "held_passed"]
NO_NUMBERS: list[object] = [None, "1", 1.5, -1, True, [1], {}, float("nan"), float("inf"), 1 << 48, 10**30]


@pytest.mark.parametrize("key", NUMBERS)
def test_numbers_of_a_record(complete: Path, key: str) -> None:
    for value in NO_NUMBERS:
        found = index_of(complete)
        found["inputs"][1][key] = value
        put_index(complete, found)
        with pytest.raises(CalibrationError, match=DAMAGED):
            read_index(complete)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("cols", 0),
        ("cols", 1 << 20),
        ("counts", []),
        ("counts", None),
        ("counts", 7),
        ("counts", "12"),
        ("counts", {"0": 1}),
        ("counts", [1.0]),
        ("counts", [True]),
        ("counts", [-1]),
        ("counts", [float("nan")]),
        ("counts", [1 << 48]),
        ("counts", [0] * 4097),
        ("tensors", []),
        ("tensors", None),
        ("tensors", 7),
        ("tensors", [7]),
        ("tensors", ["a", None]),
    ],
)
def test_other_values_of_a_record(complete: Path, key: str, value: object) -> None:
    found = index_of(complete)
    found["inputs"][1][key] = value
    put_index(complete, found)
    for reads in (read_index, Moments, start):
        with pytest.raises(CalibrationError, match=DAMAGED) as e:
            reads(complete)
        assert one_line(e)


@pytest.mark.parametrize("value", [{"a": 1}, "abc"])
def test_tensors_that_are_no_list(complete: Path, value: object) -> None:
    found = index_of(complete)
    found["inputs"][0]["tensors"] = value
    put_index(complete, found)
    with pytest.raises(CalibrationError, match=DAMAGED):
        start(complete).share({"x": "a"})


@pytest.mark.parametrize("record", [None, 7, "x", [], [1], {}])
def test_no_record(complete: Path, record: object) -> None:
    found = index_of(complete)
    found["inputs"].append(record)
    put_index(complete, found)
    with pytest.raises(CalibrationError, match=DAMAGED):
        read_index(complete)


def test_too_many_records(complete: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "MAX_RECORDS", 5)
    assert read_index(complete)
    monkeypatch.setattr(moments, "MAX_RECORDS", 4)
    with pytest.raises(CalibrationError, match=DAMAGED):
        read_index(complete)


@pytest.mark.parametrize("key", ["cols", "offset"])
def test_sums_beyond_the_file(complete: Path, key: str) -> None:
    """Numbers that the index allows and the file does not bear out; no memory is taken for them."""
    for value in ((1 << 48) - 1, 1 << 40) if key == "offset" else ((1 << 20) - 1, 1 << 18, 1 << 10):
        found = index_of(complete)
        found["inputs"][0][key] = value
        put_index(complete, found)
        for reads in (read_all, start):
            with pytest.raises(CalibrationError, match=r"sums\.1") as e:
                reads(complete)
            assert one_line(e)


@pytest.mark.parametrize("key", ["cols", *(pytest.param(k) for k in ("rows", "held", "used"))])
def test_rows_beyond_the_file(complete: Path, key: str) -> None:
    for value in (1 << 10, 1 << 19) if key == "cols" else (1 << 10, 1 << 36, (1 << 48) - 1):
        found = index_of(complete)
        found["inputs"][3][key] = value
        put_index(complete, found)
        with pytest.raises(CalibrationError, match=r"3\.") as e:
            read_all(complete)
        assert one_line(e)


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
