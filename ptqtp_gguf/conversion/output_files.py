"""The files of an output: one, or several of a size limit; their headers, and the unfinished files they grow in."""

from __future__ import annotations

import contextlib
import functools
import os
from dataclasses import dataclass
from pathlib import Path

from ..errors import OutputError
from ..files import INT32, KV, UINT16, OutTensor, align, build_header, kv_scalar, sync_folder
from ..source import part_path

MAX_PARTS = 65535


@dataclass
class Part:
    """One file: the name that it will have, the tensors first .. first+len(tensors)-1 of the output, its metadata."""

    path: Path
    first: int
    tensors: list[OutTensor]
    kvs: list[KV]
    alignment: int

    @property
    def work(self) -> Path:
        """The unfinished file."""
        return self.path.with_name(f".{self.path.name}.partial")

    @property
    def header(self) -> bytes:
        return build_header(self.kvs, self.tensors, self.alignment)

    @functools.cached_property
    def header_size(self) -> int:
        """Bytes of the header: the same whatever the tensors' types and the values of the numbers in the metadata."""
        return len(self.header)

    @property
    def size(self) -> int:
        return self.header_size + sum(align(t.nbytes, self.alignment) for t in self.tensors)

    def offset(self, index: int) -> int:
        """Byte at which tensor `index` of the output starts, or would start if it were one more."""
        before = self.tensors[: index - self.first]
        return self.header_size + sum(align(t.nbytes, self.alignment) for t in before)


def lay_out(out: Path, tensors: list[OutTensor], kvs: list[KV], alignment: int, max_size: int = 0) -> list[Part]:
    """Distribute tensors, in order, over files of at most max_size bytes (0 = one file).

    A tensor that is larger by itself gets a file of its own. The first file carries the metadata, all carry the keys
    split.* as llama-gguf-split writes them. What fits into one file is one plain file. Raises OutputError.
    """
    whole = Part(out, 0, tensors, kvs, alignment)
    if not max_size or whole.size <= max_size:
        return [whole]
    groups: list[list[OutTensor]] = [[]]
    used = _head(0, kvs, alignment)
    for t in tensors:
        need = align(t.nbytes, alignment) + _entry(t)
        if groups[-1] and used + need > max_size:
            groups.append([])
            used = _head(1, kvs, alignment)
        groups[-1].append(t)
        used += need
    if len(groups) > MAX_PARTS:
        raise OutputError(f"{out}: {len(groups)} parts of at most {max_size} bytes; the limit is {MAX_PARTS} parts")
    parts, first = [], 0
    for no, group in enumerate(groups):
        path = out.with_name(part_path(out.stem, no + 1, len(groups)))
        parts.append(Part(path, first, group, _split_kvs(no, len(groups), len(tensors), kvs), alignment))
        first += len(group)
    return parts


def _split_kvs(no: int, count: int, n_tensors: int, kvs: list[KV]) -> list[KV]:
    split = [
        kv_scalar("split.no", UINT16, no),
        kv_scalar("split.count", UINT16, count),
        kv_scalar("split.tensors.count", INT32, n_tensors),
    ]
    return [*kvs, *split] if no == 0 else split


def _head(no: int, kvs: list[KV], alignment: int) -> int:
    """Bytes of a header without tensors, and at most one alignment more."""
    return len(build_header(_split_kvs(no, 1, 1, kvs), [], alignment)) + alignment


def _entry(t: OutTensor) -> int:
    """Bytes of a tensor's entry in the header."""
    return 8 + len(t.name.encode()) + 4 + 8 * len(t.shape) + 4 + 8


def finish(parts: list[Part]) -> None:
    """Write the headers, check the sizes, push everything to the disk. Raises OutputError."""
    for part in parts:
        with open(part.work, "r+b", buffering=0) as f:
            header = part.header
            _write_all(f.fileno(), header, 0)
            written = os.fstat(f.fileno()).st_size
            if written != part.size or len(header) != part.header_size:
                raise OutputError(f"{part.path}: {written} bytes were written instead of {part.size}; try again")
            os.fsync(f.fileno())


def _write_all(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        n = os.pwrite(fd, view, offset)
        view, offset = view[n:], offset + n


def publish(parts: list[Part]) -> None:
    """Give the finished files their names; a file that has its name already is left alone. Raises OutputError."""
    for part in parts:
        if part.work.exists():
            os.replace(part.work, part.path)
        elif not part.path.exists():
            raise OutputError(f"{part.path}: vanished before the conversion was complete; convert again")
    sync_folder(parts[0].path.parent)


def share_files(out: Path) -> list[Path]:
    """Unfinished files of a target's parts, or shares (shares.py), and their journals."""
    number = "[0-9]" * 5
    return list(out.parent.glob(f".{_glob_safe(out.stem)}-{number}-of-{number}.gguf.*al"))


def discard(out: Path) -> None:
    """Remove all unfinished files of a target."""
    for work in [out.with_name(f".{out.name}.partial"), *share_files(out)]:
        with contextlib.suppress(FileNotFoundError):
            work.unlink()


def _glob_safe(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
