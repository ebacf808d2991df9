"""`diff` as a user types it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers import rewritten, write_gguf

from ptqtp_gguf.conversion.pipeline import convert
from ptqtp_gguf.files.gguf import kv_u32


@pytest.fixture
def ours(tmp_path: Path, tiny_gguf: Path) -> Path:
    convert(tiny_gguf, tmp_path / "ours.gguf")
    return tmp_path / "ours.gguf"


def test_the_command(run: Callable[..., str], ours: Path, tiny_gguf: Path, tmp_path: Path) -> None:
    shown = run("diff", tiny_gguf, ours, "--tensors")
    for text in ("only in B", "ptqtp.method", "block matrix", "TP2_2", "relative squared error", "blk.0.odd.weight"):
        assert text in shown
    same = run("diff", ours, ours, "--exit-code")
    assert "both are the same file" in same and "no difference" in same
    events = [json.loads(x) for x in run("diff", tiny_gguf, ours, "--json").splitlines()]
    assert events[-1]["event"] == "done" and len(events[-1]["tensors"]) == 7 and events[-1]["differs"]
    far = write_gguf(tmp_path / "far.gguf", {"x.weight": np.ones((2, 32), np.float32)}, arch="qwen2")
    shown = run("diff", far, ours)
    assert "no tensor has the same name" in shown and "architectures differ" in shown
    assert "only in A: x.weight (32 x 2, F32)" in shown
    crowd = rewritten(ours, tmp_path / "crowd.gguf", [kv_u32(f"key.{i}", i) for i in range(150)])
    assert "150 only in B" in (shown := run("diff", ours, crowd)) and "... and 50 more" in shown
    assert "ptqtp-gguf diff" in run("diff", "--help")


def test_exit_codes(cli: Callable, ours: Path, tiny_gguf: Path) -> None:
    different = cli("diff", tiny_gguf, ours, "--exit-code", "-q")
    assert (different.returncode, different.stdout, different.stderr) == (1, "", "")
    bad = cli("diff", ours, "absent.gguf")
    assert bad.returncode == 1 and bad.stderr == "Error: absent.gguf: No such file or directory\n"
