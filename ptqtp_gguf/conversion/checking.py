"""An output read back from the disk: what an unfinished file really holds, and whether all of it is as meant."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Protocol

from ..errors import InputError, OutputError
from ..files import Reader, align
from ..inspect import check_file, intact
from ..progress import Progress, no_progress
from .output_files import Part


class _Finished(Protocol):
    """A tensor that a journal calls finished (records.TensorRecord)."""

    @property
    def tensor(self) -> int: ...

    @property
    def hash(self) -> int: ...


def intact_tensors(parts: list[Part], records: Sequence[_Finished]) -> int:
    """How many of the tensors that a journal calls finished the unfinished files really hold, from the first on."""
    for part in parts:
        mine = records[part.first : part.first + len(part.tensors)]
        if not mine:
            break
        if not part.work.exists():
            return part.first
        fd = os.open(part.work, os.O_RDONLY)
        try:
            size = os.fstat(fd).st_size
            for record, t in zip(mine, part.tensors, strict=False):
                at = part.offset(record.tensor)
                if size < at + align(t.nbytes, part.alignment) or not intact(fd, at, t, record.hash):
                    return record.tensor
        finally:
            os.close(fd)
    return len(records)


def verify_written(
    parts: list[Part], hashes: list[int], progress: Progress = no_progress, threads: int = 0
) -> list[str]:
    """Read unfinished files back from the disk and compare them with what was meant. Returns their SHA-256.

    Raises OutputError with the first difference.
    """
    digests = []
    for part in parts:
        expected = {t.name: hashes[part.first + i] for i, t in enumerate(part.tensors)}
        try:
            with Reader(part.work, part.path) as reader:
                if reader.header.kvs != {kv.key: kv for kv in part.kvs}:
                    raise OutputError(f"{part.path}: the metadata reads back differently; is the disk sound?")
                if [(t.name, t.shape, t.type) for t in reader.tensors] != [
                    (t.name, t.shape, t.type) for t in part.tensors
                ]:
                    raise OutputError(f"{part.path}: the list of tensors reads back differently; is the disk sound?")
                found = check_file(reader, expected, progress, threads)
        except InputError as e:
            raise OutputError(f"{part.path}: does not read back: {e}; is the disk sound?") from None
        if found.faults:
            raise OutputError(f"{part.path}: {found.faults[0]}; is the disk sound?")
        digests.append(found.sha256)
    return digests
