"""The loop of a conversion: pieces are read ahead, quantized, and written behind; finished tensors go to the journal.

One tensor after the other, in pieces of whole rows, so memory does not grow with the tensor. A tensor whose values do
not fit its type is begun again with the type that it falls back to.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np

from ..calibrate import PlaneStore
from ..codec import TP2_1, TYPES, U8
from ..errors import QuantizeError
from ..files import F32_ID, Journal, ReadAhead, TensorInfo, WriteBehind, write_all
from ..plan import Below, Choice, PlanRow, fall_back, not_finite, rows_per_piece
from ..progress import Progress
from ..quantize import MASK, Done, Encoded, Encoder, Pending, checksum
from ..source import Imatrix, Importance, Source
from .output_files import Part


class FallBack(Exception):
    """The tensor's values do not fit its type."""


@dataclass
class Job:
    """What the loop works with. parts: the output files; their tensor lists grow true as tensors finish."""

    source: Source
    rows: list[PlanRow]
    parts: list[Part]
    journal: Journal
    encoder: Encoder
    method: str
    piece: int  # weights
    threads: int
    progress: Progress
    imatrix: Imatrix | None = None
    planes: PlaneStore | None = None


@dataclass
class Tally:
    """Sums over the pieces of one tensor."""

    error: float = 0.0
    power: float = 0.0
    hash: int = 0
    source: int = 0
    nbytes: int = 0
    below: Below = field(default_factory=lambda: Below(0))

    def record(self, index: int, row: PlanRow) -> dict[str, Any]:
        """The journal's line."""
        return {
            "tensor": index,
            "type": row.choice.type,
            "nbytes": self.nbytes,
            "hash": self.hash,
            "source": self.source,
            "error": self.error,
            "power": self.power,
            "why": row.choice.reason if row.choice.fallback else None,
        }


def take_record(row: PlanRow, record: dict[str, Any]) -> None:
    """Put a finished tensor's record into the plan."""
    if record["type"] != row.choice.type:
        row.choice = Choice(record["type"], record["why"] or "", fallback=True)
    if record["type"] in TYPES:
        row.rel_mse = record["error"] / record["power"] if record["power"] else 0.0


def transcode(job: Job) -> None:
    """Write all tensors that the journal does not hold yet into the unfinished files.

    Raises InputError for a value that is not finite or a source that cannot be read, OSError for the output.
    """
    total = sum(r.tensor.n_weights for r in job.rows)
    start = len(job.journal.rows)
    for part in job.parts:
        end = part.first + len(part.tensors)
        if start >= end:
            continue
        with open(part.work, "r+b" if part.work.exists() else "w+b", buffering=0) as file:
            at = part.offset(max(start, part.first))
            file.truncate(at)
            file.seek(at)
            while start < end:
                start = _run(job, part, file, start, end, total)
    job.progress("quantizing", total, total, "")


def _run(job: Job, part: Part, file: BinaryIO, start: int, end: int, total: int) -> int:
    """Tensors start .. end-1; returns the next one to do, which is earlier than end where one must begin again."""
    done = sum(r.tensor.n_weights for r in job.rows[:start])
    with ReadAhead(_pieces(job, start, end)) as pieces, WriteBehind() as sink:
        stream = iter(pieces)
        for index in range(start, end):
            row = job.rows[index]
            try:
                record = _tensor(job, row, index, stream, sink, file, done, total)
            except FallBack as e:
                row.choice = fall_back(row.tensor, str(e))
                part.tensors[index - part.first] = row.out
                sink.put(functools.partial(_rewind, file, part.offset(index)))
                return index
            pad = bytes(-record["nbytes"] % part.alignment)
            sink.put(functools.partial(_close_tensor, job.journal, file, record, pad))
            take_record(row, record)
            done += row.tensor.n_weights
    return end


def _rewind(file: BinaryIO, at: int) -> None:
    file.seek(at)
    file.truncate(at)


def _close_tensor(journal: Journal, file: BinaryIO, record: dict[str, Any], pad: bytes) -> None:
    write_all(file, pad)
    journal.append(record)


def _pieces(job: Job, start: int, end: int) -> Generator[U8, None, None]:
    """The source's bytes of tensors start .. end-1, piece by piece, each of whole rows: uint8 (R, bytes a row)."""
    for row in job.rows[start:end]:
        yield from job.source.pieces(row.tensor, rows_per_piece(row.tensor, row.choice.type, job.method, job.piece))


def _tensor(
    job: Job,
    row: PlanRow,
    index: int,
    pieces: Generator[U8, None, None],
    sink: WriteBehind,
    file: BinaryIO,
    done: int,
    total: int,
) -> dict[str, Any]:
    t, target = row.tensor, row.choice.type
    tally = Tally(below=Below(target))
    importance = job.imatrix.of(t, target, job.source.tensors) if job.imatrix else None
    waiting: deque[tuple[U8, int, Pending]] = deque()
    first = 0

    def take() -> None:
        raw, at, pending = waiting.popleft()
        _take(job, row, raw, at, _result(t, pending), tally, sink, file)
        job.progress("quantizing", done + at + len(raw) * t.shape[0], total, t.name)

    job.progress("quantizing", done, total, t.name)
    while first < t.n_weights:
        raw = next(pieces)
        tally.source += checksum(raw, first // t.shape[0] * raw.shape[1], job.threads)
        waiting.append((raw, first, _submit(job, row, raw, first, importance)))
        first += len(raw) * t.shape[0]
        while len(waiting) >= job.encoder.depth:
            take()
    while waiting:
        take()
    if why := tally.below.why_at_end():
        raise FallBack(why)
    tally.hash &= MASK
    tally.source &= MASK
    return tally.record(index, row)


def _submit(job: Job, row: PlanRow, raw: U8, first: int, importance: Importance | None) -> Pending:
    try:
        if job.planes and job.planes.has(row.tensor.name) and row.choice.type in (TP2_1.id, F32_ID):
            return Done(job.planes.encode(row.tensor, raw, first, job.threads))
        return job.encoder.submit(raw, row.tensor.type, row.choice.type, job.method, first, importance)
    except QuantizeError as e:
        raise QuantizeError(f"tensor {row.tensor.name}: {e}") from None


def _result(t: TensorInfo, pending: Pending) -> Encoded:
    try:
        return pending.result()
    except QuantizeError as e:
        raise QuantizeError(f"tensor {t.name}: {e}") from None


def _take(
    job: Job, row: PlanRow, raw: U8, first: int, piece: Encoded, tally: Tally, sink: WriteBehind, file: BinaryIO
) -> None:
    """Check one encoded piece, add it to the sums, and hand it to the writer."""
    t = row.tensor
    if piece.bad >= 0:
        raise not_finite(job.source, t, raw, first, piece.bad)
    if why := tally.below.why(piece.largest, piece.groups, piece.below):
        raise FallBack(why)
    data = np.ascontiguousarray(piece.data)
    tally.error += piece.error
    tally.power += piece.power
    tally.hash += piece.hash if row.choice.type in TYPES else checksum(data, tally.nbytes, job.threads)
    tally.nbytes += data.nbytes
    sink.put(functools.partial(write_all, file, data.data))
