"""What an evaluation has measured, kept on disk, so that a killed one can be resumed and a finished one costs nothing.

A job is a dictionary of everything that decides the figures; its hash names the file. `HASH.windows` holds frames of
one size, each a window's records behind their CRC, which begins with the job's hash: a frame that is damaged, torn or
of another job is thrown away, and its window measured again. `HASH.json` holds a small result in the same way.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import struct
import zlib
from pathlib import Path

import numpy as np

from ..errors import OutputError, PtqtpError
from ..files import parse_json, read_whole, write_all, write_text
from .scoring import RECORD, Rows

MAX_BYTES = 1 << 32  # of a file of records
Job = dict[str, str | int]
_HEAD = struct.Struct("<4sII")  # magic, window, CRC
_MAGIC = b"PTE1"


def _hash(job: Job) -> str:
    return hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()


def _place(folder: Path, job: Job, suffix: str) -> Path:
    """The job's file; makes the folder. Raises OutputError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise OutputError(f"{folder}: cannot be made: {e.strerror}; give another --state") from None
    return folder / f"{_hash(job)[:32]}.{suffix}"


class Records:
    """The windows of one file over one text. Raises OutputError where the folder cannot be written.

    windows  what is measured so far: window -> (width,) of scoring.RECORD
    """

    def __init__(self, folder: Path | None, job: Job, width: int) -> None:
        """folder: None keeps them in memory only. width: tokens that are scored a window."""
        self.windows: dict[int, Rows] = {}
        self._width, self._seed = width, zlib.crc32(_hash(job).encode())
        self._path = _place(folder, job, "windows") if folder else None
        if self._path and self._path.exists():
            self._load(self._path)

    def _frame(self, window: int, rows: Rows) -> bytes:
        raw = rows.tobytes()
        return _HEAD.pack(_MAGIC, window, zlib.crc32(struct.pack("<I", window) + raw, self._seed)) + raw

    def _load(self, path: Path) -> None:
        try:
            data = read_whole(path, MAX_BYTES, OutputError)
        except OutputError as e:
            raise OutputError(f"{e}; give another --state") from None
        size = _HEAD.size + self._width * RECORD.itemsize
        for at in range(0, len(data) - size + 1, size):
            frame = data[at : at + size]
            rows = np.frombuffer(frame, RECORD, offset=_HEAD.size)
            window = _HEAD.unpack_from(frame)[1]
            if frame == self._frame(window, rows) and finite(rows):
                self.windows[window] = rows
        if len(data) != size * len(self.windows):
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
            for window, rows in self.windows.items():
                self._write(self._frame(window, rows))

    def _write(self, frame: bytes) -> None:
        assert self._path is not None
        try:
            with open(self._path, "ab", buffering=0) as file:
                write_all(file, frame)
        except OSError as e:
            raise OutputError(f"{self._path}: writing failed: {e.strerror}; give another --state") from None

    def add(self, window: int, rows: Rows) -> None:
        """Keep a window's records, at once on disk too: the next line of a killed run needs them."""
        self.windows[window] = rows
        if self._path:
            self._write(self._frame(window, rows))

    def all(self, n: int) -> Rows:
        """The records of windows 0 to n - 1 in their order: (n * width,)."""
        return np.concatenate([self.windows[i] for i in range(n)])


def finite(rows: Rows) -> bool:
    """Whether all figures are numbers."""
    return all(bool(np.isfinite(rows[name]).all()) for name in ("nll", "nll_ref", "kld", "dp"))


def keep(folder: Path | None, job: Job, numbers: dict[str, list[int]]) -> None:
    """Keep a small result: lists of whole numbers by name. Raises OutputError."""
    if folder:
        body = {"job": job, "numbers": numbers}
        write_text(_place(folder, job, "json"), json.dumps({**body, "check": _check(body)}) + "\n")


def kept(folder: Path | None, job: Job) -> dict[str, list[int]] | None:
    """What `keep` kept for the job; None if there is nothing, or it is damaged."""
    if not folder:
        return None
    path = _place(folder, job, "json")
    try:
        found = parse_json(read_whole(path, MAX_BYTES))
        body = {"job": found["job"], "numbers": found["numbers"]}
        good = body["job"] == job and found["check"] == _check(body)
    except (PtqtpError, ValueError, KeyError, TypeError):
        return None
    return dict(body["numbers"]) if good else None


def _check(body: object) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())
