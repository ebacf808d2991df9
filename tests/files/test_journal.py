"""The journal where writes and reads give less than was asked."""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path
from typing import Any

import pytest

from ptqtp_gguf.conversion.records import ConversionJournal
from ptqtp_gguf.files import journal


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "b.gguf"


class Stingy(io.FileIO):
    """A file that reads and writes half of what it is asked for, as the system may; it fills up after `room` bytes."""

    room = 1 << 30

    def read(self, size: int | None = -1) -> bytes:
        assert size is not None and size >= 0
        return super().read(max(1, size // 2)) or b""

    def write(self, data: Any) -> int:
        part = memoryview(data).cast("B")
        if not Stingy.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        n = super().write(part[: min(Stingy.room, max(1, len(part) // 2))])
        Stingy.room -= n
        return n


RECORD = {"type": 0, "nbytes": 4, "hash": 1, "source": 2, "error": 0.0, "power": 1.0}


def test_a_journal_of_short_counts(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "open_locked", lambda path, _: Stingy(os.open(path, os.O_RDWR | os.O_CREAT), "r+"))
    with ConversionJournal(out) as j:
        j.append({"job": {"some": "thing" * 50}})
        for i in range(20):
            j.append(RECORD | {"tensor": i})
    with ConversionJournal(out) as j:
        assert j.found == 20
        j.cut(3)
    with ConversionJournal(out) as j:
        assert j.found == 3


def test_what_the_journal_could_not_take_is_not_counted(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "open_locked", lambda path, _: Stingy(os.open(path, os.O_RDWR | os.O_CREAT), "r+"))
    monkeypatch.setattr(Stingy, "room", 30)
    with pytest.raises(OSError), ConversionJournal(out) as j:
        j.append({"job": {}})
        assert j.job == {}
        j.append(RECORD | {"tensor": 0, "why": "a line that does not fit"})
    assert j.rows == []
    monkeypatch.setattr(Stingy, "room", 1 << 30)
    with ConversionJournal(out) as j:
        assert j.job == {} and j.found == 0
