"""What errors in matrices are worth: the groups that are measured together, the divergence, and a tiny model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from talking_model import write_talking_model

from ptqtp_gguf.calibrate import probing
from ptqtp_gguf.calibrate.gather import probe
from ptqtp_gguf.errors import InputError
from ptqtp_gguf.files.gguf import Reader

TOKENS = np.array([1, 260, 270, 261, 280, 262, 269, 273, 260, 265, 284, 271], np.int32)


def test_groups() -> None:
    names = [f"blk.{i}.{role}.weight" for i in range(11) for role in ("attn_q", "ffn_up")]
    found = probing.groups([*names, "output.weight", "blk.5.rare.weight"])
    assert sorted(n for g in found for n in g) == sorted([*names, "output.weight", "blk.5.rare.weight"])
    of = [g for g in found if "attn_q" in g[0]]
    assert len(of) == probing.BANDS and of[0] == ["blk.0.attn_q.weight"] and of[-1] == ["blk.10.attn_q.weight"]
    assert ["output.weight"] in found and ["blk.5.rare.weight"] in found
    assert probing.groups(["blk.0.a.weight", "blk.1.a.weight"]) == [["blk.0.a.weight"], ["blk.1.a.weight"]]


def test_divergence(rng: np.random.Generator) -> None:
    p, q = (rng.normal(size=(7, 50)).astype(np.float32) * 3 for _ in range(2))

    def soft(x: np.ndarray) -> np.ndarray:
        e = np.exp(x.astype(np.float64))
        return np.asarray(e / e.sum(axis=1, keepdims=True))

    expected = float((soft(p) * np.log(soft(p) / soft(q))).sum(axis=1).mean())
    assert probing.divergence(p, q) == pytest.approx(expected, rel=1e-4)
    assert probing.divergence(p, p) == pytest.approx(0, abs=1e-6)
    assert probing.divergence(p, q + 100) == pytest.approx(expected, rel=1e-3)  # logits have no zero of their own


@pytest.mark.runtime
def test_a_model(tmp_path: Path) -> None:
    """Every matrix is worth something, the output more than one block matrix; the same each time, in a process too."""
    path = write_talking_model(tmp_path / "m.gguf")
    with Reader(path) as r:
        names = [t.name for t in r.tensors if len(t.shape) > 1]
    told: list[tuple[int, int]] = []
    found = probing.measure(path, TOKENS, names, 1, lambda done, total: told.append((done, total)))
    assert found.keys() == set(names) and all(np.isfinite(v) and v >= 0 for v in found.values())
    assert max(found.values()) > 0 and told[-1][0] == told[-1][1] == len(probing.groups(names))
    again = probe(path, TOKENS.astype(np.int64), names, tmp_path, 1, lambda *_: None)
    assert again == pytest.approx(found, rel=1e-3)
    with pytest.raises(InputError, match="cannot load"):
        probe(tmp_path / "no.gguf", TOKENS.astype(np.int64), names, tmp_path, 1, lambda *_: None)
