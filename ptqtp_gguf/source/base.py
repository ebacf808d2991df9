"""Weights to convert, wherever they come from: tensors in their order, metadata, and each tensor's bytes in chunks.

    GgufSource     a GGUF file, or all the parts of a split one (gguf.py)
    StreamSource   a checkpoint, through llama.cpp's converter, without an intermediate file (converter.py)

Both have the same interface, so that the rest does not know which it has.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from ..codec import U8
from ..files import KV, TensorInfo, row_size
from ..progress import Progress

PIECE = 1 << 22  # weights that travel together

Stamp = list[tuple[str, int, int]]  # name, bytes, mtime in ns of each file that decides the result

SPLIT_KEYS = ("split.no", "split.count", "split.tensors.count")


def rows_together(cols: int, piece: int = PIECE) -> int:
    """Rows of a piece of about `piece` weights: a multiple of four, so that pieces of any type start at multiples of
    four bytes, as checksums want it."""
    return max(4, piece // cols // 4 * 4)


S = TypeVar("S", bound="Source")


class Source(ABC):
    """Tensors and metadata. Use as a context manager."""

    path: Path  # what errors call it
    notes: Sequence[str] = ()  # what of it neither file nor runtime carries, a line each
    kvs: dict[str, KV]
    tensors: list[TensorInfo]
    alignment: int
    stamp: Stamp

    @abstractmethod
    def chunks(self, t: TensorInfo, size: int) -> Iterator[U8]:
        """The tensor's bytes in arrays of `size` bytes; the last may be smaller. Raises InputError."""

    def pieces(self, t: TensorInfo, rows: int = 0) -> Generator[U8, None, None]:
        """The tensor in pieces of whole rows, uint8 (R, bytes a row). rows: of a piece, 0 = rows_together."""
        width = row_size(t.type, t.shape[0])
        for chunk in self.chunks(t, width * (rows or rows_together(t.shape[0]))):
            yield chunk.reshape(-1, width)

    @abstractmethod
    def as_file(self, scratch: Path, progress: Progress) -> Path:
        """A GGUF file with just this, of a split one the first part; where there is none, it is written to `scratch`,
        whole or not at all. Raises InputError, OutputError, OSError."""

    @abstractmethod
    def close(self) -> None:
        """Let go of files and processes."""

    def get(self, key: str) -> object:
        """Value of a metadata key, or None."""
        kv = self.kvs.get(key)
        return None if kv is None else kv.value()

    def __enter__(self: S) -> S:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
