"""What a long job has finished, so that a killed one resumes where it stopped: one JSON line a finished row.

The journal stands next to the target as `.NAME.journal`. Its lines are

    {"job": {...}}             what decides the result; another job cannot resume this one
    {"tensor": 0, ...}         row 0 is finished; the rest of the line is the row's own
    {"verified": [...]}        all is finished and read back; with what was said until then, "notes", if anything was
    {"failed": true}           what came before, ended with an error: the next run may go on, or begin another job

What a row holds, its owner says with the function that reads it (`Journal(..., read)`): conversion/records.py,
calibrate/store.py. A torn last line (the process died while it was written) is cut off. Any other line passes `read`
before it is used, and so does each line that is written. The open journal is locked, so that two jobs with one target
cannot meet; the lock goes with the process, however that dies.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, TypeVar

from ..errors import OutputError
from .reading import parse_json
from .writing import open_locked, write_all

MAX_BYTES = 64 << 20
MAX_LINE = 32 << 20  # the first one lists the source's files and the plan
MAX_TEXT = 4096


_SHA256 = re.compile("[0-9a-f]{64}")


def journal_path(out: Path) -> Path:
    return out.with_name(f".{out.name}.journal")


def is_count(value: object, limit: int = 1 << 64) -> bool:
    """Whether a value from a file is a whole number from 0 to below the limit."""
    return type(value) is int and 0 <= value < limit


def is_text(value: object, most: int = MAX_TEXT) -> bool:
    """Whether a value from a file is text of at most so many characters."""
    return isinstance(value, str) and len(value) <= most


Row = TypeVar("Row")
J = TypeVar("J", bound="Journal[Any]")


def any_job(job: dict[str, Any]) -> None:
    """Accept any job."""


class Journal(Generic[Row]):
    """The journal of one target, locked while it is open. Use as a context manager.

    job       what decides the result, as JSON; None before `begin`
    rows      the finished rows, as `read` makes them
    verified  SHA-256 of each file of the result, once it was read back
    failed    whether the last run ended with an error, and not by being killed or stopped
    found     rows that were there when it was opened
    Raises OutputError if another process holds it, it is damaged, or the folder cannot be written.
    """

    def __init__(
        self,
        out: Path,
        read: Callable[[dict[str, Any]], Row],
        restart: bool = False,
        check_job: Callable[[dict[str, Any]], None] = any_job,
    ) -> None:
        """Open, or begin, the journal of a target.

        read       a row's JSON -> the row; raises ValueError for a damaged one
        restart    forget what an earlier run has left, whatever it is
        check_job  raises ValueError for a damaged job
        """
        self.out, self.path, self._read, self._check_job = out, journal_path(out), read, check_job
        self.job: dict[str, Any] | None = None
        self.rows: list[Row] = []
        self._lines: list[dict[str, Any]] = []  # the rows as JSON
        self.verified: list[str] | None = None  # SHA-256 of each file
        self.notes: list[str] = []  # that came with them
        self.failed = False
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
        self.found = len(self.rows)

    def _load(self) -> None:
        size = os.fstat(self._file.fileno()).st_size
        if size > MAX_BYTES:
            raise self.damaged()
        data = b""
        while len(data) < size and (more := self._file.read(size - len(data))):
            data += more
        whole = data.rfind(b"\n") + 1
        try:
            if data and not data.startswith(b"{"):  # a torn first line would be cut off as a whole
                raise ValueError("no journal")
            for line in data[:whole].split(b"\n")[:-1]:
                if len(line) > MAX_LINE:
                    raise ValueError("no journal")
                self._take(self._checked(parse_json(line)))
        except (ValueError, TypeError, OverflowError):
            raise self.damaged() from None
        self._file.seek(whole)
        self._file.truncate(whole)

    def damaged(self) -> OutputError:
        """What to say of a journal that cannot be one of ours."""
        return OutputError(
            f"{self.path}: damaged; start over with --restart, or remove it and the .partial file beside it"
        )

    def _checked(self, record: Any) -> dict[str, Any]:
        """The record. Raises ValueError for what is none, or not in its turn."""
        if not isinstance(record, dict):
            raise ValueError("no record")
        if "job" in record:
            job = record["job"]
            if not isinstance(job, dict) or not all(isinstance(key, str) for key in job):
                raise ValueError("a damaged job")
            self._check_job(job)
        elif "verified" in record:
            sums = record["verified"]
            if not isinstance(sums, list) or not all(is_text(s, 64) and _SHA256.fullmatch(s) for s in sums):
                raise ValueError("a damaged verdict")
            notes = record.get("notes", [])
            if not isinstance(notes, list) or not all(is_text(n) and n.isprintable() for n in notes):
                raise ValueError("damaged notes")
        elif record.keys() != {"failed"}:
            if not is_count(record.get("tensor")) or record["tensor"] != len(self.rows) or self.job is None:
                raise ValueError("a tensor out of turn")
            self._read(record)
        return record

    def _take(self, record: dict[str, Any]) -> None:
        self.failed = "failed" in record
        if self.failed:
            return
        if "job" in record:
            self.job = record["job"]
        elif "verified" in record:
            self.verified, self.notes = record["verified"], record.get("notes", [])
        else:
            self.rows.append(self._read(record))
            self._lines.append(record)

    def begin(self, job: dict[str, Any]) -> None:
        """Note what is to be done."""
        self.append({"job": job})

    def verify(self, sums: list[str], notes: Sequence[str] = ()) -> None:
        """Note that the result was read back. sums: SHA-256 of each file; notes: for whoever finishes the rest."""
        said = [n for n in notes if is_text(n) and n.isprintable()]
        self.append({"verified": sums, **({"notes": said} if said else {})})

    def fail(self) -> None:
        """Note that this run ends with an error. Nothing, where no job was begun."""
        if self.job is not None and not self._file.closed:
            self.append({"failed": True})

    def append(self, record: dict[str, Any]) -> None:
        """Add one line: {"job": ...}, {"tensor": number of the row, ...} or {"verified": ...}. Raises ValueError."""
        write_all(self._file, json.dumps(self._checked(record), separators=(",", ":")).encode() + b"\n")
        self._take(record)  # what could not be written is not counted

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def cut(self, n_rows: int) -> None:
        """Forget all rows but the first n_rows, and the verdict."""
        del self.rows[n_rows:], self._lines[n_rows:]
        self.verified, self.notes, self.failed = None, [], False
        keep = [{"job": self.job}, *self._lines] if self.job is not None else []
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

    def __enter__(self: J) -> J:
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
