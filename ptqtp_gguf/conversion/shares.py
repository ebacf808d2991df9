"""A conversion in shares, so that several processes can work on it: each share is a file of its own, with a journal.

    .STEM-00001-of-00007.gguf.partial     the share's tensors
    .STEM-00001-of-00007.gguf.journal     which of them are finished (journal.py)

Of a split output the shares are its parts, in place. Of a single file they are some whole tensors each, and are joined
at the end. Which tensors a share holds depends on the plan alone, not on who works: whoever comes later, one process or
several, resumes from what is there.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import InputError
from ..files import MAX_BYTES, OutTensor, journal_path, parse_json, read_whole, write_all
from ..progress import Progress
from ..source import Source
from .checking import verify_written
from .loop import Job, transcode
from .output_files import Part, finish, lay_out, share_files
from .records import ConversionJournal, TensorRecord, require_tensors, take_up

SHARES = 128  # of a single file, about: enough to be distributed evenly, few enough to cost nothing
CHUNK = 1 << 24  # bytes copied at a time


@dataclass
class Share:
    """Some tensors of the output. first: the number of the first one there; part: its file, counting from 0."""

    first: int
    part: Part

    @property
    def end(self) -> int:
        return self.first + len(self.part.tensors)


def shares_of(out: Path, source: Source, plan: list[list[Any]], parts: list[Part]) -> list[Share]:
    """The shares of an output, in order. plan: of the job in its journal; parts: its files."""
    if len(parts) == 1:
        tensors = [OutTensor(t.name, t.shape, c[0]) for t, c in zip(source.tensors, plan, strict=True)]
        size = max(1, sum(t.nbytes for t in tensors) // SHARES)
        parts = lay_out(out, tensors, [], source.alignment, size)
    return [Share(p.first, replace(p, first=0, tensors=list(p.tensors))) for p in parts]


def left(out: Path) -> bool:
    """Whether unfinished shares of a target exist beside it."""
    return any(p.suffix == ".journal" for p in share_files(out))


def peek(share: Share, of: str) -> int:
    """How many tensors the journal of a share calls finished; it may be another's and is not locked."""
    try:
        first, *others = read_whole(journal_path(share.part.path), MAX_BYTES).split(b"\n")[:-1]
        if parse_json(first) != {"job": _mark(share, of)}:
            return 0
    except (InputError, ValueError):
        return 0
    return min(sum(b'"tensor"' in line for line in others), len(share.part.tensors))


def _mark(share: Share, of: str) -> dict[str, Any]:
    return {"of": of, "first": share.first}


def seed(share: Share, of: str, records: list[TensorRecord]) -> None:
    """Note in a share what a process that worked alone has finished of it, unless the share knows more."""
    if peek(share, of) >= len(records):
        return
    with ConversionJournal(share.part.path) as journal:
        journal.clear()
        journal.begin(_mark(share, of))
        for i, record in enumerate(records):
            journal.add(record.numbered(i))
        journal.sync()


@contextlib.contextmanager
def opened(share: Share, of: str) -> Iterator[ConversionJournal]:
    """The journal of a share, emptied where it is another output's. Raises OutputError if another process has it."""
    with ConversionJournal(share.part.path) as journal:
        if journal.job != _mark(share, of):
            journal.clear()
            share.part.work.unlink(missing_ok=True)
            journal.begin(_mark(share, of))
        yield journal


def work(job: Job, out: Path, suspect: bool, check: bool = False) -> tuple[list[TensorRecord], str]:
    """Finish one share: take up what is there, convert the rest, push it to the disk.

    job      of this share alone: its rows, its part, its journal
    out      what the user calls the output
    suspect  the source's files have other times than at the beginning: finished tensors are compared with it
    check    write the header, too, and read the file back
    Returns the records of its tensors, counted from 0, and the SHA-256 of the file if it was checked, or "".
    Raises ResumeError for another source, InputError, OSError, OutputError.
    """
    part, journal = job.parts[0], job.journal
    if suspect:
        require_tensors(out, job.source, [r.tensor for r in job.rows], journal.rows)
    take_up([part], job.rows, journal, named=False)
    if journal.verified is None:
        transcode(job)
        if check:
            finish([part])
            journal.verify(verify_written([part], [r.hash for r in journal.rows]))
        else:
            _sync(part.work)
        journal.sync()
    return list(journal.rows), journal.verified[0] if journal.verified else ""


def _sync(path: Path) -> None:
    with open(path, "rb") as f:
        os.fsync(f.fileno())


def join(job: Job, shares: list[Share], of: str, out: Path, suspect: bool) -> None:
    """Take all shares into the output, in order, and finish those that are not. What is taken in, is removed.

    job: of the whole output, its journal open. Raises as `work` does.
    """
    in_place = len(job.parts) > 1
    for share in shares:
        start = len(job.journal.rows)
        if start < share.end:
            if in_place and start > share.first:
                seed(share, of, job.journal.rows[share.first : start])
            progress = shifted(job.progress, sum(r.tensor.n_weights for r in job.rows[: share.first]), job.total)
            with opened(share, of) as journal:
                rows = job.rows[share.first : share.end]
                mine = replace(job, rows=rows, parts=[share.part], journal=journal, progress=progress)
                records = [r.numbered(share.first + r.tensor) for r in work(mine, out, suspect)[0]]
            if in_place:
                for record in records[start - share.first :]:
                    job.journal.add(record)
            else:
                _copy(job, share, records[start - share.first :])
            job.journal.sync()
        journal_path(share.part.path).unlink(missing_ok=True)
        if not in_place:
            share.part.work.unlink(missing_ok=True)


def shifted(progress: Progress, base: int, total: int) -> Progress:
    """Progress of a part of the work as that of the whole: `base` weights were done before, `total` are to be done."""
    return lambda stage, done, _, detail: progress(stage, base + done, total, detail)


def _copy(job: Job, share: Share, records: list[TensorRecord]) -> None:
    """Tensors of a finished share, behind what the single file holds already."""
    whole = job.parts[0]
    with (
        open(whole.work, "r+b" if whole.work.exists() else "w+b", buffering=0) as file,
        open(share.part.work, "rb", buffering=0) as data,
    ):
        for record in records:
            i = record.tensor
            whole.tensors[i] = job.rows[i].out
            file.seek(whole.offset(i))
            data.seek(share.part.offset(i - share.first))
            _pass_on(data, file, record.nbytes)
            write_all(file, bytes(-record.nbytes % whole.alignment))
            job.journal.add(record)
        file.truncate()
        os.fsync(file.fileno())


def _pass_on(data: BinaryIO, file: BinaryIO, n: int) -> None:
    while n:
        chunk = data.read(min(n, CHUNK))
        if not chunk:
            raise OSError(0, "a share of the output is shorter than it was")
        write_all(file, chunk)
        n -= len(chunk)


def assign(weights: list[int], n_ranks: int) -> list[list[int]]:
    """Which shares each rank does: the heaviest first, each to the rank that has the least so far. Indices, in order.

    weights: of the work that each share still takes
    """
    load = [0] * n_ranks
    mine: list[list[int]] = [[] for _ in range(n_ranks)]
    for i in sorted(range(len(weights)), key=lambda i: (-weights[i], i)):
        rank = min(range(n_ranks), key=lambda r: (load[r], len(mine[r]), r))
        load[rank] += weights[i]
        mine[rank].append(i)
    return [sorted(indices) for indices in mine]
