"""What a conversion has finished, so that a killed one goes on where it was: one JSON line a finished tensor.

The journal lies beside the target as `.NAME.journal`, the unfinished file as `.NAME.partial`. The lines are

    {"job": {...}}                         everything that decides the bytes, and the plan
    {"tensor": 0, "type": 251, ...}        tensor 0 is in the partial file
    {"verified": [...]}                    the file is whole and read back; only its name is missing

A torn last line (the process died while it was written) is cut off. The open journal is locked, so that two
conversions to one target cannot meet; the lock goes with the process, however that dies.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from .errors import OutputError

try:
    import fcntl
except ImportError:  # not a POSIX system: no lock there
    fcntl = None  # type: ignore[assignment]

MAX_BYTES = 256 << 20


def journal_path(out: Path) -> Path:
    return out.with_name(f".{out.name}.journal")


class Journal:
    """The journal of one target, locked while it is open. Use as a context manager.

    Raises OutputError if another process holds it, or the folder cannot be written.
    """

    def __init__(self, out: Path, restart: bool = False) -> None:
        """restart: forget what an earlier run has left, whatever it is."""
        self.out, self.path = out, journal_path(out)
        self.job: dict[str, Any] | None = None
        self.rows: list[dict[str, Any]] = []
        self.verified: list[str] | None = None  # SHA-256 of each file
        try:
            self._file = self._open()
        except OSError as e:
            raise OutputError(f"{out}: cannot write in {out.parent}: {e.strerror}") from None
        self._removed = False
        self.found = 0  # tensors that were finished when it was opened
        try:
            if restart:
                self._file.truncate(0)
            self._load()
            self.found = len(self.rows)
        except BaseException:
            self._file.close()
            raise

    def _open(self) -> BinaryIO:
        while True:
            file = open(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)
            try:
                if fcntl:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # the one who held it may have finished and removed it in between
                if self.path.exists() and os.path.samestat(os.fstat(file.fileno()), os.stat(self.path)):
                    return file
            except BlockingIOError:
                file.close()
                raise OutputError(
                    f"{self.out}: another conversion to this file is running; wait for it, or write to another name"
                ) from None
            except FileNotFoundError:
                pass
            file.close()

    def _load(self) -> None:
        size = os.fstat(self._file.fileno()).st_size
        data = self._file.read(min(size, MAX_BYTES)) or b""
        whole = data.rfind(b"\n") + 1
        try:
            for line in data[:whole].splitlines():
                self._take(json.loads(line))
        except (ValueError, KeyError, TypeError, AssertionError):
            raise OutputError(
                f"{self.path}: damaged; begin anew with --restart, or remove it and the .partial file beside it"
            ) from None
        self._file.seek(whole)
        self._file.truncate(whole)

    def _take(self, record: dict[str, Any]) -> None:
        if "job" in record:
            self.job = record["job"]
        elif "verified" in record:
            self.verified = record["verified"]
        else:
            assert record["tensor"] == len(self.rows) and self.job is not None
            self.rows.append(record)

    def append(self, record: dict[str, Any]) -> None:
        """Add one record: a job, a tensor, or the verdict."""
        self._take(record)
        self._file.write(json.dumps(record, separators=(",", ":")).encode() + b"\n")

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def cut(self, n_rows: int) -> None:
        """Forget all tensors but the first n_rows, and the verdict."""
        del self.rows[n_rows:]
        self.verified = None
        keep = [{"job": self.job}, *self.rows] if self.job is not None else []
        data = b"".join(json.dumps(r, separators=(",", ":")).encode() + b"\n" for r in keep)
        self._file.seek(0)
        self._file.truncate(0)
        self._file.write(data)

    def clear(self) -> None:
        """Forget everything; the journal itself stays, and locked."""
        self.job = None
        self.cut(0)

    def remove(self) -> None:
        """Remove the file, once: with it goes the lock, and the next one there may be somebody else's."""
        if not self._removed:
            self._removed = True
            with contextlib.suppress(FileNotFoundError):
                self.path.unlink()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        if self.job is None and not self._file.closed:
            self.remove()
        self._file.close()
