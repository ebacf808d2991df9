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
from typing import Any

from .errors import OutputError
from .output import open_locked, write_all

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
        self._removed = False
        busy = f"{out}: another conversion to this file is running; wait for it, or write to another name"
        try:
            self._file = open_locked(self.path, busy)
        except OSError as e:
            raise OutputError(f"{out}: cannot write in {out.parent}: {e.strerror}") from None
        try:
            if restart:
                self._file.truncate(0)
            self._load()
        except OSError as e:
            self._file.close()
            raise OutputError(f"{self.path}: {e.strerror}") from None
        except BaseException:
            self._file.close()
            raise
        self.found = len(self.rows)  # tensors that were finished when it was opened

    def _load(self) -> None:
        size = min(os.fstat(self._file.fileno()).st_size, MAX_BYTES)
        data = b""
        while len(data) < size and (more := self._file.read(size - len(data))):
            data += more
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
        write_all(self._file, json.dumps(record, separators=(",", ":")).encode() + b"\n")
        self._take(record)  # what could not be written is not counted

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
        write_all(self._file, data)

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
        try:
            if self.job is None and not self._file.closed:
                self.remove()
        except OSError:
            if kind is None:
                raise
        finally:
            self._file.close()
