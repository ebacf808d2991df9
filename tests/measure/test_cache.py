"""What is kept of a measurement on disk, and taken up again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ptqtp_gguf.errors import OutputError
from ptqtp_gguf.measure.cache import Job, Records, finite, keep, kept
from ptqtp_gguf.measure.scoring import RECORD, Rows


def some_rows(n: int) -> Rows:
    rng = np.random.default_rng(n)
    rows = np.zeros(n, RECORD)
    for name in ("nll", "nll_ref", "kld"):
        rows[name] = rng.exponential(size=n)
    rows["dp"], rows["same_top"] = rng.uniform(-1, 1, n), rng.integers(0, 2, n)
    return rows


JOB: Job = {"text": "x", "ctx": 8}


def test_records_are_taken_up(tmp_path: Path) -> None:
    first = Records(tmp_path / "state", JOB, 3)
    for i in range(4):
        first.add(i, some_rows(3 + 0 * i))
    again = Records(tmp_path / "state", JOB, 3)
    assert sorted(again.windows) == [0, 1, 2, 3] and np.array_equal(again.all(4), first.all(4))
    assert not Records(tmp_path / "state", {**JOB, "ctx": 9}, 3).windows


@pytest.mark.parametrize("how", ["flipped", "torn", "foreign", "garbage"])
def test_damaged_records_are_thrown_away(tmp_path: Path, how: str) -> None:
    records = Records(tmp_path, JOB, 3)
    for i in range(3):
        records.add(i, some_rows(3))
    (path,) = tmp_path.iterdir()
    raw = bytearray(path.read_bytes())
    left = {0, 2}
    if how == "flipped":
        raw[len(raw) // 2] ^= 4
    elif how == "torn":
        raw, left = raw[:-5], {0, 1}
    elif how == "foreign":  # the frames of another job, under this job's name
        other = Records(tmp_path, {**JOB, "text": "y"}, 3)
        other.add(1, some_rows(3))
        third = len(raw) // 3
        raw[third : 2 * third] = next(p for p in tmp_path.iterdir() if p != path).read_bytes()
    else:
        raw, left = bytearray(b"\0" * 1000), set()
    path.write_bytes(raw)
    again = Records(tmp_path, JOB, 3)
    assert set(again.windows) == left
    again.add(1 if how != "torn" else 2, some_rows(3))
    assert set(Records(tmp_path, JOB, 3).windows) == left | {1 if how != "torn" else 2}


def test_small_results_and_errors(tmp_path: Path) -> None:
    keep(tmp_path, JOB, {"values": [1, 2]})
    assert kept(tmp_path, JOB) == {"values": [1, 2]} and kept(tmp_path, {"ctx": 1}) is None
    (path,) = tmp_path.iterdir()
    path.write_text(path.read_text().replace("[1, 2]", "[1, 3]"))
    assert kept(tmp_path, JOB) is None
    assert kept(None, JOB) is None
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"file.*--state"):
        Records(tmp_path / "file", JOB, 3)
    bad = some_rows(3)
    bad["kld"][1] = np.nan
    assert finite(some_rows(3)) and not finite(bad)
