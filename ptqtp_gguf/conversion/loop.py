"""The loop of a conversion: pieces are read ahead, quantized, and written behind; finished tensors go to the journal.

One tensor after the other, in pieces of whole rows, so memory does not grow with the tensor. A tensor whose values do
not fit its type is begun again with the type that it falls back to. The pieces are read in the order in which the
tensors are written, so that `_pieces` and the loop agree on every piece's rows without telling each other.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from ..calibrate import PlaneStore
from ..codec import TYPES, U8
from ..errors import OutOfReach, QuantizeError
from ..files import F32_ID, ReadAhead, TensorInfo, WriteBehind, write_all
from ..plan import Below, PlanRow, not_finite, rows_per_piece, settle
from ..progress import Progress
from ..quantize import MASK, Done, Encoded, Encoder, Pending, checksum, methods
from ..source import Imatrix, Importance, Source, uses_importance
from .output_files import Part
from .records import ConversionJournal, TensorRecord


class FallBack(Exception):
    """The tensor's values do not fit its type. largest: |weight| among those seen; 0 where that is not the reason."""

    def __init__(self, why: str, largest: float = 0.0) -> None:
        super().__init__(why)
        self.largest = largest


@dataclass
class Job:
    """What the loop works with.

    rows    the plan; a tensor that falls back changes its row
    parts   the output files; their tensor lists are provisional until the tensors are finished
    method  data-free; for what `planes` does not hold
    piece   weights that travel together
    planes  made before by calibration or tuning, or None
    importance  what calibration has found inputs to count, for stock types
    pinned  names of tensors whose type is the user's own word: they do not fall back
    """

    source: Source
    rows: list[PlanRow]
    parts: list[Part]
    journal: ConversionJournal
    encoder: Encoder
    method: methods.Method
    piece: int
    threads: int
    progress: Progress
    imatrix: Imatrix | None = None
    planes: PlaneStore | None = None
    importance: Callable[[TensorInfo, int], Importance | None] | None = None
    pinned: frozenset[str] = frozenset()

    def weighed_by(self, row: PlanRow) -> Importance | None:
        """What the inputs of a tensor count, where its type asks for it."""
        t, kind = row.tensor, row.choice.type
        if self.imatrix:
            return self.imatrix.of(t, kind, self.source.tensors)
        if self.importance and kind not in TYPES and uses_importance(t, kind, self.source.tensors):
            return self.importance(t, kind)
        return None

    @functools.cached_property
    def total(self) -> int:
        """Weights of all tensors."""
        return sum(r.tensor.n_weights for r in self.rows)


def transcode(job: Job) -> None:
    """Write all tensors that the journal does not hold yet into the unfinished files.

    Raises InputError for a value that is not finite or a source that cannot be read, OSError for the output.
    """
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
                start = _run(job, part, file, start, end)
    job.progress("quantizing", job.total, job.total, "")


def _run(job: Job, part: Part, file: BinaryIO, start: int, end: int) -> int:
    """Tensors start .. end-1; returns the next one to do, which is earlier than end where one must begin again."""
    done = sum(r.tensor.n_weights for r in job.rows[:start])
    with ReadAhead(_pieces(job, start, end)) as pieces, WriteBehind() as sink:
        stream = iter(pieces)
        for index in range(start, end):
            row = job.rows[index]
            try:
                record = _tensor(job, row, stream, TensorWriter(job, index, sink, file), done)
            except FallBack as e:
                settle(row, str(e), e.largest, job.pinned)
                part.tensors[index - part.first] = row.out
                sink.put(functools.partial(_rewind, file, part.offset(index)))
                return index
            pad = bytes(-record.nbytes % part.alignment)
            sink.put(functools.partial(_close_tensor, job.journal, file, record, pad))
            record.put_into(row)
            done += row.tensor.n_weights
    return end


def _rewind(file: BinaryIO, at: int) -> None:
    file.seek(at)
    file.truncate(at)


def _close_tensor(journal: ConversionJournal, file: BinaryIO, record: TensorRecord, pad: bytes) -> None:
    write_all(file, pad)
    journal.add(record)


def _pieces(job: Job, start: int, end: int) -> Generator[U8, None, None]:
    """The source's bytes of tensors start .. end-1, piece by piece, each of whole rows: uint8 (R, bytes a row)."""
    for row in job.rows[start:end]:
        yield from job.source.pieces(row.tensor, rows_per_piece(row.tensor, row.choice.type, job.method, job.piece))


def _tensor(job: Job, row: PlanRow, pieces: Generator[U8, None, None], writer: TensorWriter, done: int) -> TensorRecord:
    """One tensor, encoded piece by piece; at most `depth` pieces are with the encoder at a time. Raises FallBack."""
    t = row.tensor
    importance = job.weighed_by(row)
    waiting: deque[tuple[U8, int, Pending]] = deque()
    first = 0
    job.progress("quantizing", done, job.total, t.name)
    while first < t.n_weights or waiting:
        if first < t.n_weights:
            raw = next(pieces)
            writer.read(raw, first)
            waiting.append((raw, first, _submit(job, row, raw, first, importance)))
            first += len(raw) * t.shape[0]
        while len(waiting) >= (job.encoder.depth if first < t.n_weights else 1):
            raw, at, pending = waiting.popleft()
            writer.write(raw, at, _result(row, pending))
            job.progress("quantizing", done + at + len(raw) * t.shape[0], job.total, t.name)
    return writer.end()


def _submit(job: Job, row: PlanRow, raw: U8, first: int, importance: Importance | None) -> Pending:
    planes = job.planes
    try:
        if planes and planes.has(row.tensor.name) and row.choice.type in (planes.kind_of(row.tensor.name).id, F32_ID):
            return Done(planes.encode(row.tensor, raw, first, job.threads))
        return job.encoder.submit(raw, row.tensor.type, row.choice.type, job.method.name, first, importance)
    except OutOfReach as e:
        raise FallBack(str(e)) from None
    except QuantizeError as e:
        raise QuantizeError(f"tensor {row.tensor.name}: {e}") from None


def _result(row: PlanRow, pending: Pending) -> Encoded:
    try:
        return pending.result()
    except OutOfReach as e:
        raise FallBack(str(e)) from None
    except QuantizeError as e:
        raise QuantizeError(f"tensor {row.tensor.name}: {e}") from None


class TensorWriter:
    """Takes the pieces of one tensor in order: checks them, adds up what the journal notes, hands them to the file."""

    def __init__(self, job: Job, index: int, sink: WriteBehind, file: BinaryIO) -> None:
        self._job, self._index, self._row, self._sink, self._file = job, index, job.rows[index], sink, file
        self._below = Below(self._row.choice.type)
        self._error = self._power = 0.0
        self._hash = self._source = self._nbytes = 0

    def read(self, raw: U8, first: int) -> None:
        """A piece of the source, uint8 (R, B), whose first weight has the index first."""
        self._source += checksum(raw, first // self._row.tensor.shape[0] * raw.shape[1], self._job.threads)

    def write(self, raw: U8, first: int, piece: Encoded) -> None:
        """The same piece, encoded. Raises InputError for a value that is not finite, FallBack for one out of reach."""
        if piece.bad >= 0:
            raise not_finite(self._job.source, self._row.tensor, raw, first, piece.bad)
        if why := self._below.why(piece.largest, piece.groups, piece.below):
            raise FallBack(why, piece.largest)
        data = np.ascontiguousarray(piece.data)
        ours = self._row.choice.type in TYPES
        self._error += piece.error
        self._power += piece.power
        self._hash += piece.hash if ours else checksum(data, self._nbytes, self._job.threads)
        self._nbytes += data.nbytes
        self._sink.put(functools.partial(write_all, self._file, data.data))

    def end(self) -> TensorRecord:
        """What the journal notes of the tensor. Raises FallBack where most groups lie below the scales' range."""
        if why := self._below.why_at_end():
            raise FallBack(why)
        choice = self._row.choice
        return TensorRecord(
            self._index,
            choice.type,
            self._nbytes,
            self._hash & MASK,
            self._source & MASK,
            self._error,
            self._power,
            choice.reason if choice.fallback else None,
        )
