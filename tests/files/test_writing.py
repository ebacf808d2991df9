"""Files that appear whole or not at all, and the cache's folder."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from ptqtp_gguf.errors import OutputError
from ptqtp_gguf.files.writing import cache_folder, partial_file, write_text


def test_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("PTQTP_CACHE", raising=False)
    assert cache_folder("eval") == tmp_path / "xdg" / "ptqtp-gguf" / "eval"
    monkeypatch.setenv("PTQTP_CACHE", str(tmp_path / "own"))
    assert cache_folder("eval") == tmp_path / "own" / "eval" and (tmp_path / "own" / "eval").is_dir()


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "b.gguf"


def names(out: Path) -> list[str]:
    return sorted(p.name for p in out.parent.iterdir())


def test_a_partial_file_of_a_killed_process(out: Path) -> None:
    left = out.with_name(".b.gguf.new")
    left.write_bytes(b"of one that was killed" * 100)
    write_text(out, "new")
    assert out.read_text() == "new" and names(out) == ["b.gguf"]
    assert out.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def test_one_writer_at_a_time(out: Path) -> None:
    with partial_file(out) as first:
        first.file.write(b"first")
        with pytest.raises(OutputError, match="another process is writing this file"), partial_file(out):
            pass
        first.sync()
        first.publish()
    assert out.read_bytes() == b"first" and names(out) == ["b.gguf"]


def test_a_full_disk_and_a_text(out: Path) -> None:
    with pytest.raises(OutputError, match="No space left on device; nothing of it was left behind"), partial_file(out):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert names(out) == []
