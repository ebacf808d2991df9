"""The text that quality is measured on."""

from __future__ import annotations

import pytest

from ptqtp_gguf.calibrate.documents import read as documents_of
from ptqtp_gguf.calibrate.texts import BUILTIN_FILE as CALIBRATION_FILE
from ptqtp_gguf.measure.text import load_text

pytestmark = pytest.mark.runtime


def test_builtin_text_is_apart_from_the_calibration_text() -> None:
    found = load_text(None)
    assert found.builtin and 100_000 < len(found.text.encode()) < 150_000
    documents = documents_of(CALIBRATION_FILE, "builtin")
    assert len(documents) > 100 and any(d.messages for d in documents)
    learned = {s.strip() for d in documents for s in d.text.splitlines()}
    lines = {s.strip() for s in found.text.splitlines()}
    assert not {s for s in lines & learned if len(s) > 40}
