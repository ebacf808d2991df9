"""Fixtures of the tests of moments."""

from __future__ import annotations

from pathlib import Path

import pytest

from ptqtp_gguf.calibrate import moments


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "moments").mkdir()
    return tmp_path / "moments"


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs of more than 64 values get no sums."""
    monkeypatch.setattr(moments, "SUM_COLS", 64)
