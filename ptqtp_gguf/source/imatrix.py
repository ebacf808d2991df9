"""Importance matrices as llama-imatrix writes them: how much each input of a matrix matters, from the texts it ran on.

For every input of a tensor the file holds the mean square of what came in there; an error of a weight then counts by
that much. Both kinds of file are read, GGUF and the older .dat, to the numbers that llama-quantize reads from them
(common/imatrix-loader.cpp, tools/quantize/quantize.cpp): NAME.in_sum2 over NAME.counts, expert by expert.

The values stay in the file and are read a tensor at a time, so that memory does not grow with the model.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..codec import F32, TYPES, U8
from ..errors import InputError
from ..files import F32_ID, MAGIC, MAX_NAME, Reader, TensorInfo, open_regular, read_bytes, sha256_of
from ..llamacpp import ggml

EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"
SUMS, COUNTS = ".in_sum2", ".counts"  # suffixes of a tensor's name
MAX_TEXT = 127  # characters of a file's or a data set's name that go into metadata, as in llama-quantize
MAX_PATH = 1 << 16  # bytes of a data set's path in the file
MAX_NAMED = 5  # data sets, tensors or experts that a line names
MAX_ENTRIES = 1 << 18
MAX_VALUES = 1 << 28  # of one tensor, all experts; what is read at once
MAX_CHUNKS = 2**31 - 1
_SMALLEST_ENTRY = 17  # bytes of a .dat entry: three lengths, a name of one letter, one value


class Importance(NamedTuple):
    """What one tensor's inputs count."""

    values: F32  # (experts, C), finite, >= 0; none of the rows is zero, and each is within ggml's reach
    rows: int  # of one expert
    unseen: tuple[int, ...] = ()  # experts that no token has reached; their values are 1

    def split(self, rows: NDArray[np.int64]) -> Iterator[tuple[slice, F32]]:
        """Ascending rows of the tensor (all experts joined) -> runs of one expert: slice of `rows`, importance (C,)."""
        expert = rows // self.rows
        cuts = [0, *(np.flatnonzero(np.diff(expert)) + 1).tolist(), len(rows)]
        for a, b in pairwise(cuts):
            if a < b:
                yield slice(a, b), self.values[expert[a]]


@dataclass(frozen=True)
class _Entry:
    """One tensor's part of the file: byte of its first value, values in all, tokens (or calls) of each matrix."""

    offset: int
    n: int
    counts: F32  # (matrices,)


class _Values(Mapping[str, F32]):
    """name -> mean square of each input, float32 (C,), or (experts, C); read from the file at each access.

    Parts that no token has reached are zero. Raises InputError where the file has changed for the worse.
    """

    def __init__(self, entries: dict[str, _Entry], read: Callable[[int, int, str], U8], where: str) -> None:
        self._entries, self._read, self._where = entries, read, where

    def __getitem__(self, name: str) -> F32:
        e = self._entries[name]
        sums = self._read(e.offset, 4 * e.n, name).view("<f4").astype(np.float32, copy=False)
        validate(sums, e.counts, f"{self._where}: {name}")
        parts = sums.reshape(e.counts.size, -1)
        mean = np.where(e.counts[:, None] > 0, parts / np.maximum(e.counts, np.float32(1))[:, None], np.float32(0))
        return mean[0] if len(mean) == 1 else mean

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


class Imatrix:
    """An importance matrix. Use as a context manager, or close it.

    values    by the name of the model's tensor; see _Values
    name      of the file, without its folder
    chunks    of text that it was made from; 0 = not told
    datasets  names of the texts, without their folders
    sha256    of the file, in hex
    """

    def __init__(self, path: Path) -> None:
        """Reads the whole file once. Raises InputError for one that is damaged, hostile or of another kind."""
        self.path = path
        self.name = _line(path.name)
        self._file = open_regular(path)
        try:
            self.size = os.fstat(self._file.fileno()).st_size
            if self.size == 0:
                raise InputError(f"{path}: the file is empty")
            self.legacy = bytes(self._bytes(0, min(4, self.size), "magic")) != MAGIC
            entries, self.chunks, told = _index_dat(self) if self.legacy else _index_gguf(self)
            self.datasets = tuple(_line(re.split(r"[/\\]", text)[-1]) for text in told)
            self.values: Mapping[str, F32] = _Values(entries, self._bytes, str(path))
            for name in entries:
                self.values[name]
            self.sha256 = sha256_of(self._file, f"{path}: the file")
        except OSError as e:
            self.close()
            raise InputError(f"{path}: {e.strerror}") from None
        except BaseException:
            self.close()
            raise

    def _bytes(self, at: int, n: int, what: str) -> U8:
        """n bytes from byte `at` on. Raises InputError where the file does not hold them (any more)."""
        return read_bytes(self._file, at, n, f"{self.path}: {what}")

    def __enter__(self) -> Imatrix:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    @property
    def text(self) -> str:
        """In a line, for people: the file, how much text, which."""
        chunks = f"{self.chunks} chunks" if self.chunks else "chunks not told"
        return ", ".join([f"imatrix {self.name}", chunks, *_some(self.datasets)])

    def check(self, tensors: Sequence[TensorInfo]) -> None:
        """Raises InputError where lengths do not match the model's, or the file holds none of its tensors."""
        found = [t for t in tensors if t.name in self.values]
        if not found:
            raise InputError(
                f"{self.path}: none of its {len(self.values)} tensors, e.g. {next(iter(self.values))}, is in the "
                "model; make an imatrix with this model"
            )
        for t in found:
            self._of(t)

    def of(self, t: TensorInfo, target: int, model: Sequence[TensorInfo] = ()) -> Importance | None:
        """What the tensor's inputs count when it becomes the type `target`; None where nothing is known or wanted.

        model: all tensors of the model; see looked_up. Raises InputError for a length that does not match.
        """
        return self._of(t) if uses_importance(t, target, model) else None

    def _of(self, t: TensorInfo) -> Importance | None:
        if t.name not in self.values:
            return None
        values = self.values[t.name]
        experts = int(np.prod(t.shape[2:], dtype=np.int64))
        if values.size != t.shape[0] * experts:
            many = f"{experts} x " if experts > 1 else ""
            raise InputError(
                f"{self.path}: {t.name} has {values.size} values, the model's tensor {many}{t.shape[0]} inputs; "
                "make an imatrix with this model"
            )
        table = values.reshape(experts, t.shape[0])
        seen: NDArray[np.bool_] = np.asarray((table > 0).any(axis=1))
        if self.legacy and experts > 1:
            seen &= (table != 1).any(axis=1)  # what the old format writes for an expert without a token
        if not seen.any():
            return None
        unseen = tuple(np.flatnonzero(~seen).tolist())
        tame = [ggml.tamed(row) if s else np.ones_like(row) for row, s in zip(table, seen, strict=True)]
        return Importance(np.stack(tame), t.shape[1] if len(t.shape) > 1 else 1, unseen)

    def unweighted(self, t: TensorInfo, target: int, model: Sequence[TensorInfo] = ()) -> str | None:
        """What of the tensor goes without importance although its type takes one, and why; None if nothing does."""
        if not uses_importance(t, target, model):
            return None
        if t.name not in self.values:
            return "unweighted, the imatrix does not have it"
        found = self._of(t)
        if found is None:
            return "unweighted, the imatrix has seen no token there"
        if found.unseen:
            return f"experts {', '.join(_some(found.unseen))} unweighted, the imatrix has seen no token there"
        return None


def read(path: Path) -> Imatrix:
    """Open an importance matrix of either kind and look through it. Raises InputError."""
    return Imatrix(path)


def uses_importance(t: TensorInfo, target: int, model: Sequence[TensorInfo] = ()) -> bool:
    """Whether the bytes of the tensor in the type `target` depend on an importance. model: all of its tensors."""
    return target != t.type and (target in TYPES or target in ggml.USES_IMPORTANCE) and not looked_up(t, model)


def looked_up(t: TensorInfo, model: Sequence[TensorInfo]) -> bool:
    """Whether the tensor is the embedding of a model that has an output of its own.

    Nothing is multiplied with such a one, so it has no inputs to weigh, whatever a file says (those of llama-imatrix
    say nothing), and it comes out the same with and without the runtime, which alone quantizes Q4_0 by importance.
    """
    return t.name == EMBEDDING and any(o.name == OUTPUT for o in model)


def validate(sums: F32, counts: F32, where: str) -> None:
    """Raises InputError unless sums (n,) are numbers >= 0 that divide evenly among counts (k,), numbers >= 0 too."""
    if not counts.size or sums.size % counts.size:
        raise InputError(
            f"{where}: {sums.size} values do not divide among {counts.size} counts; the imatrix is damaged"
        )
    for what, x in (("value", sums), ("count", counts)):
        good = np.isfinite(x) & (x >= 0)
        if not good.all():
            i = int(np.argmin(good))
            raise InputError(f"{where}: {what} {i} is {x[i]}, a sum of squares cannot be; the imatrix is damaged")


def _line(text: str) -> str:
    """One line of at most MAX_TEXT characters, without control characters and lone surrogates."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text[:MAX_TEXT])


def _some(items: Sequence[object]) -> list[str]:
    shown = [str(x) for x in items[:MAX_NAMED]]
    return [*shown, f"and {len(items) - MAX_NAMED} more"] if len(items) > MAX_NAMED else shown


# ---- GGUF ----


def _index_gguf(f: Imatrix) -> tuple[dict[str, _Entry], int, list[str]]:
    """Entries, chunks and data sets of a GGUF imatrix."""
    with Reader(f.path) as reader:
        header = reader.header

    def get(key: str) -> object:
        kv = header.kvs.get(key)
        try:
            return None if kv is None else kv.value()
        except InputError as e:
            raise InputError(f"{f.path}: {e}") from None

    kind = get("general.type")
    if kind not in (None, "imatrix") or "imatrix.chunk_count" not in header.kvs:
        raise InputError(f"{f.path}: a GGUF, but no imatrix; llama-imatrix makes one")
    by_name = {t.name: t for t in header.tensors}
    entries = {}
    for t in header.tensors:
        for mine, other in ((SUMS, COUNTS), (COUNTS, SUMS)):
            if t.name.endswith(mine):
                name = t.name.removesuffix(mine)
                if name + other not in by_name:
                    raise InputError(f"{f.path}: {t.name} stands without {name + other}; the imatrix is damaged")
                for of in (t, by_name[name + other]):
                    if of.type != F32_ID:
                        raise InputError(f"{f.path}: {of.name} is of type {of.type_name}; an imatrix holds F32")
        if t.name.endswith(SUMS):
            name = t.name.removesuffix(SUMS)
            raw = by_name[name + COUNTS]
            if max(t.n_weights, raw.n_weights) > MAX_VALUES:
                raise InputError(f"{f.path}: {t.name} has {t.n_weights} values, the limit is {MAX_VALUES}")
            counts = f._bytes(raw.offset, raw.nbytes, raw.name).view("<f4").astype(np.float32, copy=False)
            with np.errstate(invalid="ignore"):  # validate reports what is not a number
                entries[name] = _Entry(t.offset, t.n_weights, np.floor(counts + np.float32(0.5)))
    if not entries:
        raise InputError(f"{f.path}: an imatrix without a tensor; make it again, with more text")
    chunks, datasets = get("imatrix.chunk_count"), get("imatrix.datasets")
    names = [x for x in datasets if isinstance(x, str)] if isinstance(datasets, list) else []
    if isinstance(chunks, int) and chunks > MAX_CHUNKS:
        raise InputError(f"{f.path}: made from {chunks} chunks, the limit is {MAX_CHUNKS}; the imatrix is damaged")
    return entries, chunks if isinstance(chunks, int) and chunks > 0 else 0, names


# ---- .dat ----


def _index_dat(f: Imatrix) -> tuple[dict[str, _Entry], int, list[str]]:
    """Entries, chunks and data set of an imatrix in the older format, which has no mark of its own."""
    at = 0

    def take(n: int, what: str) -> bytes:
        nonlocal at
        if n > f.size - at:
            raise InputError(f"{f.path}: no imatrix, or cut short: {what} needs {n} bytes, {f.size - at} are left")
        at += n
        return bytes(f._bytes(at - n, n, what))

    def number(what: str, least: int, most: int) -> int:
        value = int(struct.unpack("<i", take(4, what))[0])
        if not least <= value <= most:
            raise InputError(f"{f.path}: no imatrix, or damaged: {what} is {value}, not {least} to {most}")
        return value

    entries: dict[str, _Entry] = {}
    for i in range(number("number of entries", 1, min(MAX_ENTRIES, f.size // _SMALLEST_ENTRY))):
        try:
            name = take(number(f"length of name {i}", 1, MAX_NAME), f"name {i}").decode()
        except UnicodeDecodeError:
            raise InputError(f"{f.path}: no imatrix, or damaged: name {i} is not UTF-8") from None
        if name in entries:
            raise InputError(f"{f.path}: {name} stands twice; the imatrix is damaged")
        calls = number(f"calls of {name}", 0, 2**31 - 1)
        n = number(f"values of {name}", 1, min(MAX_VALUES, (f.size - at - 4) // 4))
        entries[name] = _Entry(at, n, np.array([calls], np.float32))
        at += 4 * n
    if at == f.size:  # files of the first versions end here
        return entries, 0, []
    chunks = number("number of chunks", 0, MAX_CHUNKS)
    text = take(number("length of the data set's name", 0, min(MAX_PATH, f.size - at - 4)), "the data set's name")
    if at != f.size:
        raise InputError(f"{f.path}: no imatrix, or damaged: {f.size - at} bytes follow its end")
    return entries, chunks, [text.decode(errors="replace")] if text else []
