"""Moments that are taken up after a kill; those of something else are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from kept_moments import KEY, by_name, contents, feed, start, values

from ptqtp_gguf.calibrate import moments
from ptqtp_gguf.calibrate.moments import (
    Gathering,
    Index,
    Moments,
    read_index,
    require_key,
    sums_path,
    write_index,
)
from ptqtp_gguf.errors import CalibrationError, OutputError

# ---- taken up again ----


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
