"""Whether an output is what it should be: loadable, before it is made; as it was meant, when it is read back."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Sequence
from typing import Protocol

from ..errors import InputError, OutputError
from ..files import KV, OutTensor, Reader, align
from ..inspect import ask_runtime, check_file, intact
from ..llamacpp import why_header_not_loadable
from ..progress import Progress, no_progress
from ..source import Source
from .output_files import Part

# what the runtime says, and what to do about it
WAYS_OUT = {
    r"tensor '(token_embd|output)\.weight' has wrong shape": "the list of tokens (vocab_size) must be as long as "
    "the tensor has rows",
    r"has wrong shape": "its settings (config.json) ask for the first, the tensor has the second: correct the settings",
    r"unknown model architecture": "a newer llama.cpp may know it",
    r"": "its settings, tokenizer and tensors must fit one another",
}


def require_loadable(source: Source, kvs: list[KV], tensors: list[OutTensor], alignment: int) -> str:
    """Let the runtime read the header of an output that is not there yet, as one file.

    Returns a note where it could not be asked, else "". Raises InputError, with the runtime's reason, where it does not
    load such a file.
    """
    found = ask_runtime({kv.key for kv in kvs}, functools.partial(why_header_not_loadable, kvs, tensors, alignment))
    if found.why is None:
        return found.note
    way = next(text for pattern, text in WAYS_OUT.items() if re.search(pattern, found.why))
    raise InputError(
        f"{source.path}: the runtime could not load the output: {found.why}; {way}, or give --no-load-check to convert "
        "it all the same"
    )


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
