"""Modules stay small; order and doors are held again when the rooms stand (docs/architecture.md)."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import REPO

PACKAGE = REPO / "ptqtp_gguf"
MAX_LINES = 500


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        found[name.removesuffix(".__init__") if name != "__init__" else ""] = path
    return found


@pytest.mark.parametrize("name", modules())
def test_modules_stay_small(name: str) -> None:
    assert len(modules()[name].read_text().splitlines()) <= MAX_LINES
