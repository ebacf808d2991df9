"""A source that is a GGUF file, or all the parts of a split one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from ..codec import U8
from ..errors import InputError
from ..files import Reader, TensorInfo
from ..progress import Progress
from .base import SPLIT_KEYS, Source

PART_NAME = re.compile(r"(?P<stem>.+)-(?P<no>\d{5})-of-(?P<count>\d{5})\.gguf")


def part_path(stem: str, no: int, count: int) -> str:
    """Name of part no (from 1) of a split GGUF, as llama-gguf-split has it."""
    return f"{stem}-{no:05d}-of-{count:05d}.gguf"


def stem_of(path: Path) -> str:
    """A GGUF file's name without suffix, and of a split one without the part's number."""
    part = PART_NAME.fullmatch(path.name)
    return part["stem"] if part else path.stem


class GgufSource(Source):
    """A GGUF file of any ggml type. Of a split one, any part names the whole.

    Raises InputError if the file, or a part, is missing, damaged, or belongs to another model.
    """

    def __init__(self, path: Path, name: Path | None = None) -> None:
        """name: what errors call the file, where it is only our intermediate of something that the user knows."""
        self.path, self._file = name or path, path
        self.readers: list[Reader] = []
        try:
            self._open(path, name)
        except BaseException:
            self.close()
            raise

    def _open(self, path: Path, name: Path | None) -> None:
        first = Reader(path, name)
        self.readers.append(first)
        paths = [path]
        count = first.get("split.count")
        if first.get("split.no") and count is None:
            raise InputError(f"{path}: calls itself a part of a split GGUF, but not of how many; the file is damaged")
        if isinstance(count, int) and count > 1:
            paths = _parts(path, count)
            self._file = paths[0]
            first.close()
            self.readers.clear()
            for no, part in enumerate(paths):
                self.readers.append(_part(part, no, count))
        self.kvs = {k: v for k, v in self.readers[0].header.kvs.items() if k not in SPLIT_KEYS}
        self.alignment = self.readers[0].header.alignment
        self._reader_of: dict[str, Reader] = {}
        self.tensors = []
        for reader in self.readers:
            for t in reader.tensors:
                if t.name in self._reader_of:
                    raise InputError(f"{reader.path}: tensor {t.name} stands in {self._reader_of[t.name].path} too")
                self._reader_of[t.name] = reader
                self.tensors.append(t)
        expected = self.readers[0].get("split.tensors.count")
        if len(paths) > 1 and isinstance(expected, int) and expected != len(self.tensors):
            raise InputError(f"{path}: the parts hold {len(self.tensors)} tensors, {expected} are announced")
        self.readers[0].check_format_version(self.tensors)
        self.stamp = [(p.name, s.st_size, s.st_mtime_ns) for p in paths for s in [p.stat()]]

    def chunks(self, t: TensorInfo, size: int) -> Iterator[U8]:
        return self._reader_of[t.name].chunks(t, size)

    def as_file(self, scratch: Path, progress: Progress) -> Path:
        return self._file

    def close(self) -> None:
        for reader in self.readers:
            reader.close()


def _parts(path: Path, count: int) -> list[Path]:
    match = PART_NAME.fullmatch(path.name)
    if not match or int(match["count"]) != count:
        raise InputError(
            f"{path}: one of {count} parts of a split GGUF, whose names must end in "
            f"{part_path('', 1, count)} and so on; rename them, or merge them with llama-gguf-split"
        )
    paths = [path.with_name(part_path(match["stem"], no, count)) for no in range(1, count + 1)]
    for part in paths:
        if not part.is_file():
            raise InputError(f"{part}: this part of {count} is missing")
    return paths


def _part(path: Path, no: int, count: int) -> Reader:
    reader = Reader(path)
    if (reader.get("split.no"), reader.get("split.count")) != (no, count):
        reader.close()
        raise InputError(f"{path}: its metadata does not call it part {no + 1} of {count}")
    return reader
