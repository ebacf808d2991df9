"""What a conversion has finished, so that a killed one goes on where it was: one JSON line a finished tensor.

The journal lies beside the target as `.NAME.journal`, the unfinished file as `.NAME.partial`. The lines are

    {"job": {...}}                         everything that decides the bytes, and the plan
    {"tensor": 0, "type": 251, ...}        tensor 0 is in the partial file
    {"verified": [...]}                    the file is whole and read back; only its name is missing

A torn last line (the process died while it was written) is cut off; any other line is checked before it is used, by the
one `validate` that writing passes too. The open journal is locked, so that two
conversions to one target cannot meet; the lock goes with the process, however that dies.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import OutputError
from .gguf import GGML_TYPES
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


def validate_tensor(record: dict[str, Any]) -> None:
    """Raises ValueError unless a conversion can be taken up behind this tensor."""
    sums = all(isinstance(record.get(k), float | int) and math.isfinite(record[k]) for k in ("error", "power"))
    good = sums and all(is_count(record.get(k)) for k in ("nbytes", "hash", "source"))
    why = record.get("why")
    if not good or record.get("type") not in GGML_TYPES or not (why is None or is_text(why)):
        raise ValueError("a damaged tensor record")


def validate_job(job: object) -> None:
    """Raises ValueError for what is no job of a conversion, or of an intermediate file."""
    if not isinstance(job, dict) or not all(isinstance(key, str) for key in job):
        raise ValueError("a damaged job")
    stamps = job.get("stamp", job.get("bf16", []))
    files = isinstance(stamps, list) and all(
        isinstance(s, list) and len(s) == 3 and is_text(s[0]) and is_count(s[1]) and is_count(abs(s[2])) for s in stamps
    )
    plan = job.get("plan", [])
    choices = isinstance(plan, list) and all(
        isinstance(c, list) and len(c) == 3 and c[0] in GGML_TYPES and is_text(c[1]) and isinstance(c[2], bool)
        for c in plan
    )
    if not files or not choices or not isinstance(job.get("options", {}), dict):
        raise ValueError("a damaged job")


class Journal:
    """The journal of one target, locked while it is open. Use as a context manager.

    Raises OutputError if another process holds it, it is damaged, or the folder cannot be written.
    """

    def __init__(
        self, out: Path, restart: bool = False, validate: Callable[[dict[str, Any]], None] = validate_tensor
    ) -> None:
        """restart: forget what an earlier run has left, whatever it is. validate: of one row; raises ValueError."""
        self.out, self.path, self._validate = out, journal_path(out), validate
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
            f"{self.path}: damaged; begin anew with --restart, or remove it and the .partial file beside it"
        )

    def _checked(self, record: Any) -> dict[str, Any]:
        """The record. Raises ValueError for what is none, or not in its turn."""
        if not isinstance(record, dict):
            raise ValueError("no record")
        if "job" in record:
            validate_job(record["job"])
        elif "verified" in record:
            sums = record["verified"]
            if not isinstance(sums, list) or not all(is_text(s, 64) and _SHA256.fullmatch(s) for s in sums):
                raise ValueError("a damaged verdict")
        else:
            if not is_count(record.get("tensor")) or record["tensor"] != len(self.rows) or self.job is None:
                raise ValueError("a tensor out of turn")
            self._validate(record)
        return record

    def _take(self, record: dict[str, Any]) -> None:
        if "job" in record:
            self.job = record["job"]
        elif "verified" in record:
            self.verified = record["verified"]
        else:
            self.rows.append(record)

    def append(self, record: dict[str, Any]) -> None:
        """Add one record: a job, a tensor, or the verdict."""
        write_all(self._file, json.dumps(self._checked(record), separators=(",", ":")).encode() + b"\n")
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
